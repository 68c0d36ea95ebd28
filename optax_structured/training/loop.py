"""The one loop: compiled steps, evaluations, and a folder that can be continued."""

import pathlib
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from optax_structured import diagnostics
from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.clock import Clock
from optax_structured.training.devices import in_any_process, is_first
from optax_structured.training.folder import Row, check_empty, save_config
from optax_structured.training.history import LOSSES, History
from optax_structured.training.names import counted
from optax_structured.training.task import State, Task

_SECONDS_BETWEEN_SAVES = 10.0
_SKIPS_IN_A_ROW = 10  # steps with a gradient that is not finite, after which a run stops


class Result(NamedTuple):
    """A run so far."""

    state: State
    history: History
    began: int  # the step that this call began at
    step: int  # and the one it ended at


def train(
    task: Task,
    folder: pathlib.Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    watch: Callable[[Row], None] = lambda row: None,
    warn: Callable[[str], None] = warnings.warn,
) -> Result:
    """Trains from the start, or continues as if nothing had happened.

    Args:
      task: the run.
      folder: the run folder; gets `config.json`, `checkpoints/` and the files of `History`.
      resume: continue from the checkpoint in `folder`; from the start if the run was killed before
        its first one.
      stop_after: leave after this many units of the task in all; the run can be resumed.
      stopped: asked after each compiled call; once true, the run is saved where it is and left.
      watch: called with the latest metrics after each compiled call.
      warn: called with a sentence after a call in which gradients were not finite: these steps
        were skipped.

    Raises:
      ValueError: `stop_after` below 1.
      FileExistsError: a new run into a folder that is not empty.
      FloatingPointError: gradients were not finite in ten steps in a row, or no loss since the last
        evaluation was.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"stop_after must be at least 1 {task.unit}, got {stop_after}")
    writes = is_first()
    if not resume:
        check_empty(folder)
        in_any_process(False)  # none writes before all have looked
        folder.mkdir(parents=True, exist_ok=True)
        if writes:
            save_config(task.config, folder)
    state, step, history = task.init(), 0, History()
    with Checkpoints(folder) as checkpoints:
        if resume and (checkpoints or (folder / LOSSES).exists()):  # neither: killed before a step
            step, state = checkpoints.restore(state)
            history = History.read(folder, step)
        else:
            checkpoints.save(0, state)
        if resume and writes:
            save_config(task.config, folder)  # it may have been extended
        began = step
        last = min(task.total_steps, (stop_after or task.length) * task.steps_a_unit)
        if step < last:  # compiles before the clock starts
            state, _ = task.steps(state, step, 0)
        clock, saved = Clock(), time.monotonic()
        (leaving,) = in_any_process(stopped())
        row: Row = history.rows[-1] if history.rows else {}
        while step < last and not leaving:
            evaluation = (step // task.evaluate_every + 1) * task.evaluate_every
            count = min(task.steps_a_call, evaluation - step, last - step)
            with clock.timing(count):
                state, losses = task.steps(state, step, count)
                found = np.asarray(losses)[:count]  # waits for the call
            step += count
            history.losses = np.append(history.losses, found)
            before = row.get("skipped", 0)
            row = _metrics(task, state, step, history, clock)
            if row["skipped"] > before:
                skipped = counted(row["skipped"] - before, "step")
                sentence = f"gradients were not finite in {skipped} before step {step}"
                warn(f"{sentence}, which changed nothing")
            if step in (evaluation, task.total_steps):
                measured = task.evaluate(state, step)
                row |= measured.row
                history.add(measured._replace(row=row))
                clock = Clock()
            watch(row)
            due = time.monotonic() - saved > _SECONDS_BETWEEN_SAVES
            leaving, due = in_any_process(stopped(), due)
            if step == last or leaving or due:
                if writes:
                    history.write(folder)
                checkpoints.save(step, state)
                saved = time.monotonic()
    return Result(state, history, began, step)


def _metrics(task: Task, state: State, step: int, history: History, clock: Clock) -> Row:
    """All that is read of a run after each compiled call; the last evaluation stays in view.

    Raises:
      FloatingPointError: as `train`.
    """
    skips = diagnostics.nonfinite(state.opt_state)
    row = {
        **(history.rows[-1] if history.rows else {}),
        "step": step,
        "loss": history.mean_loss(),
        "skipped": int(skips.skipped),
        **clock.reading(),
        **task.watch(state),
    }
    if skips.in_a_row >= _SKIPS_IN_A_ROW or not np.isfinite(row["loss"]):
        raise FloatingPointError(
            f"gradients or loss are not finite, {skips.in_a_row} steps in a row at step {step}: "
            "training diverged; lower --learning-rate"
        )
    return row
