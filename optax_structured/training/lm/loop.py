"""The run: compiled steps, evaluations of the held-out text, and a folder that can be continued."""

import math
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.folder import Row, begin, read_table, write_table
from optax_structured.training.lm.experiment import STEPS_A_CALL, Experiment, State
from optax_structured.training.lm.probes import Probes

METRICS, LOSSES, LEAVES = "metrics.csv", "losses.npy", "leaves.csv"
_SECONDS_BETWEEN_SAVES = 10.0


class Result(NamedTuple):
    """A run so far."""

    experiment: Experiment
    state: State
    rows: list[Row]  # one an evaluation
    losses: np.ndarray  # (steps so far,) float32
    leaves: list[Row]  # one an evaluation and low-rank leaf


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
      folder: the run folder; gets `config.json`, `metrics.csv`, `losses.npy`, `leaves.csv` and
        `checkpoints/`.
      resume: continue from the checkpoint in `folder`.
      stop_after: leave after this many steps in all; the run can be resumed.
      watch: called with the latest metrics after each compiled call.

    Raises:
      ValueError: `stop_after` below 1.
      FileExistsError: a new run into a folder that is not empty.
      FloatingPointError: the loss is no longer finite.
    """
    config = experiment.config
    begin(config, folder, resume=resume, stop_after=stop_after, unit="step")
    state, step = experiment.init(), 0
    rows: list[Row] = []
    leaves: list[Row] = []
    losses = np.zeros(0, np.float32)
    with Checkpoints(folder) as checkpoints:
        if resume:
            step, state = checkpoints.restore(state)
            rows, losses, leaves = _read(folder, step)
        else:
            checkpoints.save(0, state)
        probes = Probes(experiment)
        last = config.steps if stop_after is None else min(stop_after, config.steps)
        if step < last:  # compiles before the clock starts
            state, _ = experiment.steps(state, step, 0)
        clock, saved = Clock(config.tokens_a_step), time.monotonic()
        while step < last:
            evaluation = (step // config.evaluate_every + 1) * config.evaluate_every
            count = min(STEPS_A_CALL, evaluation - step, last - step)
            with clock.timing(count):
                state, found = experiment.steps(state, step, count)
                losses = np.append(losses, np.asarray(found)[:count])  # waits for the call
            step += count
            previous = rows[-1] if rows else {"step": 0}
            row = {
                **previous,
                "step": step,
                "tokens": step * config.tokens_a_step,
                "loss": float(losses[previous["step"] :].mean()),
                **clock.reading(),
            }
            if not np.isfinite(losses[-count:]).all():
                raise FloatingPointError(
                    f"the loss is not finite at step {step}: training diverged; lower "
                    "--learning-rate"
                )
            if step in (evaluation, config.steps):
                loss = experiment.held_out_loss(state.params)
                row |= {
                    "held_out_loss": loss,
                    "perplexity": math.exp(loss),
                    "bits_per_byte": loss / math.log(2),
                }
                rows.append(row)
                leaves += probes.rows(state, step)
                clock = Clock(config.tokens_a_step)
            watch(row)
            if step == last or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                _write(folder, rows, losses, leaves)
                checkpoints.save(step, state)
                saved = time.monotonic()
    return Result(experiment, state, rows, losses, leaves)


class Clock:
    """The pace of the steps since the last evaluation."""

    def __init__(self, tokens_a_step: int) -> None:
        self._tokens, self._steps = tokens_a_step, 0
        self._seconds: list[float] = []
        self._pace: list[float] = []

    def timing(self, count: int) -> "Clock":
        """Use as a context around a call of `count` steps."""
        self._count = count
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.append(time.perf_counter() - self._start)
        self._pace.append(self._seconds[-1] / self._count)
        self._steps += self._count

    def reading(self) -> Row:
        """Tokens a second, refreshes included; the median call's milliseconds a step."""
        return {
            "tokens_per_second": round(self._steps * self._tokens / sum(self._seconds), 1),
            "step_ms": round(1e3 * float(np.median(self._pace)), 3),
        }


def state_bytes(state: State) -> int:
    """What the optimizer state takes, summed over the arrays that are there."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))


def _write(folder: pathlib.Path, rows: list[Row], losses: np.ndarray, leaves: list[Row]) -> None:
    np.save(folder / LOSSES, losses)
    for name, table in ((METRICS, rows), (LEAVES, leaves)):
        if table:
            write_table(folder / name, table)


def _read(folder: pathlib.Path, step: int) -> tuple[list[Row], np.ndarray, list[Row]]:
    """What was seen up to this step; anything later is from after the checkpoint."""

    if not step:
        return [], np.zeros(0, np.float32), []
    rows, leaves = (
        [row for row in _table(folder / name) if row["step"] <= step] for name in (METRICS, LEAVES)
    )
    return rows, np.load(folder / LOSSES)[:step], leaves


def evaluations(folder: pathlib.Path) -> list[Row]:
    """Those that a run, finished or not, has written."""
    return _table(folder / METRICS)


def _table(path: pathlib.Path) -> list[Row]:
    return read_table(path) if path.exists() else []
