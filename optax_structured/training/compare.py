"""Several recipes on the same data: each at the best of its own learning rates, over seeds."""

import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from optax_structured.training import plots
from optax_structured.training.clock import Clock
from optax_structured.training.config import check_same
from optax_structured.training.folder import CONFIG, Row, check_empty, load_config
from optax_structured.training.history import evaluations
from optax_structured.training.run import run
from optax_structured.training.task import Task

TABLE = "comparison.md"
_CALLS_TO_TIME, _STEPS_TO_TIME, _SECONDS_TO_TIME = 12, 10, 0.3  # the last two of a call, at most


class Stopped(Exception):
    """A comparison that was left before its end; all of it is saved."""


class Ends(NamedTuple):
    """One recipe after its runs."""

    task: Task  # at the best learning rate
    swept: dict[float, float]  # learning rate -> score on the first seed
    rows: list[list[Row]]  # a seed each, at the best learning rate
    step_ms: float


def compare(
    tasks: Mapping[str, Task],
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    folder: pathlib.Path,
    console: Console,
    *,
    resume: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Sweeps each learning rate on the first seed, then runs the best from every seed.

    Each run has a folder of its own in `folder`, next to `comparison.md` and `comparison.png`. With
    `resume`, finished runs are read and unfinished ones continued. A run that diverges is the
    worst.

    Args:
      tasks: by the name that a recipe has in the table.
      rates: learning rates by the same names, as many for each: see `check_budget`.
      seeds: the first is the one of the sweep.
      folder: where to write.
      console: where to say what goes on.
      resume: continue what is in `folder`.
      stopped: as for `loop.train`.

    Returns:
      The table, as markdown.

    Raises:
      Stopped: because `stopped` said so.
    """
    if not resume:
        check_empty(folder)

    def rows_of(name: str, rate: float, seed: int) -> list[Row]:
        task = tasks[name].variant(learning_rate=rate, seed=seed)
        path = folder / f"{name.replace(':', '-')}-{rate:g}-{seed}"
        return _rows(task, path, console, stopped)

    swept: dict[str, dict[float, float]] = {}
    runs: dict[str, list[list[Row]]] = {}
    best: dict[str, Task] = {}
    for name, task in tasks.items():
        of_rate = {rate: rows_of(name, rate, seeds[0]) for rate in rates[name]}
        swept[name] = {rate: score(task, rows) for rate, rows in of_rate.items()}
        rate = min(of_rate, key=lambda rate: swept[name][rate])
        runs[name] = [of_rate[rate], *(rows_of(name, rate, seed) for seed in seeds[1:])]
        best[name] = task.variant(learning_rate=rate)
    pace = step_ms(best)
    ends = {name: Ends(best[name], swept[name], runs[name], pace[name]) for name in best}
    return _write(ends, seeds, folder)


def check_budget(rates: Mapping[str, Sequence[float]]) -> None:
    """Raises ValueError unless every recipe has equally many learning rates, all different."""
    counts = {name: len(set(values)) for name, values in rates.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"every recipe needs the same number of learning rates, at least one; got {listed}"
        )


def score(task: Task, rows: Sequence[Row]) -> float:
    """What a sweep makes small: the first number of the first panel; infinite if it diverged."""
    column = next(iter(task.panels[0].lines))
    return rows[-1][column] if rows else math.inf


def step_ms(tasks: Mapping[str, Task]) -> dict[str, float]:
    """Median milliseconds a step, the recipes in turn, so that a busy machine slows all alike."""
    states = {name: task.init() for name, task in tasks.items()}
    clocks, counts = {name: Clock() for name in tasks}, {}
    for name, task in tasks.items():
        states[name], _ = task.steps(states[name], 0, 0)  # compiles
        began = time.perf_counter()
        states[name], losses = task.steps(states[name], 0, 1)
        np.asarray(losses)
        longest = _SECONDS_TO_TIME / (time.perf_counter() - began)
        counts[name] = max(1, min(_STEPS_TO_TIME, int(longest)))
    for _ in range(_CALLS_TO_TIME):
        for name, task in tasks.items():
            with clocks[name].timing(counts[name]):
                states[name], losses = task.steps(states[name], 0, counts[name])
                np.asarray(losses)
    return {name: clock.reading()["step_ms"] for name, clock in clocks.items()}


def _rows(
    task: Task, path: pathlib.Path, console: Console, stopped: Callable[[], bool]
) -> list[Row]:
    """The evaluations of one run, new, continued or read; none if it diverged."""
    started = (path / CONFIG).exists()
    if started:
        check_same(load_config(path, task.config_type), vars(task.config), ignoring=(task.located,))
        if (rows := evaluations(path)) and rows[-1]["step"] == task.total_steps:
            return rows
    try:
        result = run(task, path, console, resume=started, stopped=stopped)
    except FloatingPointError:
        console.print(f"{path.name} diverged")
        return []
    if result.step < task.total_steps:
        raise Stopped
    return result.history.rows


def _write(ends: Mapping[str, Ends], seeds: Sequence[int], folder: pathlib.Path) -> str:
    first = next(iter(ends.values())).task
    reference = ends["adamw"].step_ms if "adamw" in ends else None
    judged, costs = first.columns, ("learning rate", "state bytes", "step, ms", "of adamw's")
    headings = [*(column.heading for column in judged), *costs]
    lines = [
        f"| recipe | {' | '.join(headings)} | settings |",
        f"|---|{'---:|' * len(headings)}---|",
    ]
    for name, (task, swept, rows, ms) in ends.items():
        rate = task.config.learning_rate
        cells = [
            *(column.ends(rows) for column in judged),
            f"{rate:g}{' (edge)' if len(swept) > 1 and rate in (min(swept), max(swept)) else ''}",
            f"{_bytes(task):,}",
            f"{ms:.1f}",
            "" if reference is None else f"{ms / reference:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {task.config.settings()} |")
    table = "\n".join(lines) + "\n"
    if any(len(end.swept) > 1 for end in ends.values()):
        grids = "\n".join(
            f"- {name}: " + ", ".join(f"{rate:g} → {x:.4g}" for rate, x in end.swept.items())
            for name, end in ends.items()
        )
        table += f"\nLearning rate → {judged[0].heading} on seed {seeds[0]}:\n\n{grids}\n"
    listed = ", ".join(map(str, seeds))
    (folder / TABLE).write_text(f"{first.describe()}, seeds {listed}\n\n{table}")
    whole = {name: end.rows for name, end in ends.items() if all(end.rows)}
    if whole:
        plots.draw_comparison(first, whole, f"{' on '.join(first.subject)}, seeds {listed}", folder)
    return table


def _bytes(task: Task) -> int:
    leaves = jax.tree.leaves(task.abstract_state().opt_state)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
