"""The run: epochs of compiled steps, metrics, and a folder that can be continued."""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.folder import begin, read_table, write_table
from optax_structured.training.images.experiment import Experiment, State

METRICS, STRIPS = "metrics.csv", "strips.npz"
_FIRST_COLUMNS = ("epoch", "step", "loss", "accuracy", "point_accuracy")
_STEPS_A_CALL = 120
_SECONDS_BETWEEN_SAVES = 10.0

Row = dict[str, float]
Strips = dict[str, list[np.ndarray]]


class Result(NamedTuple):
    """A run so far."""

    experiment: Experiment
    state: State
    rows: list[Row]  # one an epoch
    strips: Strips  # path -> one array an epoch, of the prox point


def train(
    experiment: Experiment,
    folder: pathlib.Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    watch: Callable[[Row], None] = lambda row: None,
) -> Result:
    """Trains from the start, or continues as if nothing had happened.

    Args:
      experiment: the run.
      folder: the run folder; gets `config.json`, `metrics.csv`, `strips.npz`, `checkpoints/`.
      resume: continue from the checkpoint in `folder`.
      stop_after: leave after this many epochs in all; the run can be resumed.
      watch: called with the latest metrics after each compiled call.

    Raises:
      ValueError: `stop_after` below 1.
      FileExistsError: a new run into a folder that is not empty.
      FloatingPointError: the loss is no longer finite.
    """
    config = experiment.config
    begin(config, folder, resume=resume, stop_after=stop_after, unit="epoch")
    state, done = experiment.init(), 0
    rows: list[Row] = []
    strips: Strips = {}
    with Checkpoints(folder) as checkpoints:
        if resume:
            step, state = checkpoints.restore(state)
            done = step // experiment.steps_per_epoch
            rows, strips = _read(folder, done)
        else:
            checkpoints.save(0, state)
        saved = time.monotonic()
        last = config.epochs if stop_after is None else min(stop_after, config.epochs)
        for epoch in range(done, last):
            state, row = _epoch(experiment, state, epoch, rows[-1] if rows else {}, watch)
            rows.append(row)
            for path, strip in experiment.strips(experiment.point(state)).items():
                strips.setdefault(path, []).append(np.asarray(strip))
            if epoch + 1 == last or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                _write(folder, rows, strips)
                checkpoints.save((epoch + 1) * experiment.steps_per_epoch, state)
                saved = time.monotonic()
    return Result(experiment, state, rows, strips)


def _epoch(
    experiment: Experiment,
    state: State,
    epoch: int,
    previous: Row,
    watch: Callable[[Row], None],
) -> tuple[State, Row]:
    order, losses, seconds = experiment.order(epoch), [], 0.0
    row = {**previous, "epoch": epoch + 1, "step": epoch * len(order)}
    for piece in np.array_split(order, -(-len(order) // _STEPS_A_CALL)):
        start = time.perf_counter()
        state, loss = experiment.steps(state, piece)
        losses.append(np.asarray(loss))  # waits for the call
        seconds += time.perf_counter() - start
        row["step"] += len(piece)
        row["loss"] = float(np.mean(losses[-1]))
        row["steps_per_second"] = (row["step"] - epoch * len(order)) / seconds
        row.update(_structure(experiment, state))
        watch(row)
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(
                f"the loss is {row['loss']} at step {row['step']}: training diverged; lower "
                "--learning-rate"
            )
    row["loss"] = float(np.mean(np.concatenate(losses)))
    row["accuracy"] = experiment.accuracy(state.params)
    row["point_accuracy"] = experiment.accuracy(experiment.point(state))
    watch(row)
    return state, {**{name: row[name] for name in _FIRST_COLUMNS}, **row}


def _structure(experiment: Experiment, state: State) -> Row:
    of_w = experiment.structure_of(state.params)
    of_point = experiment.structure_of(experiment.point(state))
    found = {**of_w, **{f"point_{name}": value for name, value in of_point.items()}}
    return {name: float(value) for name, value in jax.device_get(found).items()}


def _write(folder: pathlib.Path, rows: list[Row], strips: Strips) -> None:
    write_table(folder / METRICS, rows)
    arrays: dict[str, Any] = {path: np.stack(strip) for path, strip in strips.items()}
    np.savez_compressed(folder / STRIPS, **arrays)


def _read(folder: pathlib.Path, epochs: int) -> tuple[list[Row], Strips]:
    """The metrics of the first epochs; later ones are from after the checkpoint."""
    if not epochs:
        return [], {}
    rows = read_table(folder / METRICS)
    with np.load(folder / STRIPS) as arrays:
        strips = {path: list(arrays[path][:epochs]) for path in arrays.files}
    return rows[:epochs], strips
