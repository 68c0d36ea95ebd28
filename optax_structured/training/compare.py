"""Several recipes on the same data: each at the best of its own learning rates, over seeds."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from optax_structured.training import frontier, plots
from optax_structured.training.comparison import FILE, Comparison, Entry, load
from optax_structured.training.config import check_same
from optax_structured.training.folder import CONFIG, Row, check_empty, load_config
from optax_structured.training.history import evaluations
from optax_structured.training.peers import KNOWN
from optax_structured.training.run import run
from optax_structured.training.task import Task

TABLE = "comparison.md"
_ROUNDS_TO_TIME = 11
_STEPS_A_ROUND, _SECONDS_A_ROUND = 50, 1.5  # at most; 50 have a refit, at the usual period


class Stopped(Exception):
    """A comparison that was left before its end; all of it is saved."""


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

    Each run has a folder of its own in `folder`, next to `comparison.json`, `comparison.md` and the
    pictures, which are written after each recipe. With `resume`, finished runs are read and
    unfinished ones continued. A run that diverges is the worst.

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

    first, listed = next(iter(tasks.values())), ", ".join(map(str, seeds))
    found = Comparison(
        f"{first.describe()}, seeds {listed}",
        f"{' on '.join(first.subject)}, seeds {listed}",
        first.columns,
        first.costs,
        {},
    )
    timed = load(folder).entries if resume and (folder / FILE).exists() else {}
    runs: dict[str, list[list[Row]]] = {}
    best: dict[str, Task] = {}
    for name, task in tasks.items():
        of_rate = {rate: rows_of(name, rate, seeds[0]) for rate in rates[name]}
        swept = {rate: score(task, rows) for rate, rows in of_rate.items()}
        rate = best_rate(task, of_rate)
        runs[name] = [of_rate[rate], *(rows_of(name, rate, seed) for seed in seeds[1:])]
        best[name] = task.variant(learning_rate=rate)
        found.entries[name] = _entry(best[name], swept, runs[name])
        _write(found, runs, first, folder)
    if timed.keys() == best.keys() and all(entry.in_turn for entry in timed.values()):
        pace = {name: entry.step_ms for name, entry in timed.items()}
    else:
        pace = step_ms(best)
    for name, quartiles in pace.items():
        found.entries[name] = dataclasses.replace(
            found.entries[name], step_ms=quartiles, in_turn=True
        )
    return _write(found, runs, first, folder)


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


def best_rate(task: Task, of_rate: Mapping[float, Sequence[Row]]) -> float:
    """The one of the best score; where more of a cost is better, of most of it near that score.

    Near is within the standard error of the score: it does not tell these rates apart.

    Args:
      task: with any learning rate.
      of_rate: the evaluations of the run with each.
    """
    scores = {rate: score(task, rows) for rate, rows in of_rate.items()}
    wanted, least = task.costs[0], min(scores.values())
    if not wanted.more_is_better or least == math.inf:
        return min(scores, key=scores.__getitem__)
    near = [rate for rate, found in scores.items() if found <= least + task.score_error(least)]
    return max(near, key=lambda rate: (of_rate[rate][-1][wanted.name], -scores[rate]))


def step_ms(tasks: Mapping[str, Task]) -> dict[str, Sequence[float]]:
    """Quartiles of milliseconds a step, the recipes in turn: a busy machine slows all alike."""
    states = {name: task.init() for name, task in tasks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    counts: dict[str, int] = {}

    def run(name: str, count: int) -> float:
        task, begin = tasks[name], time.perf_counter()
        for done in range(0, count, task.steps_a_call):
            states[name], losses = task.steps(states[name], 0, min(task.steps_a_call, count - done))
            np.asarray(losses)
        return time.perf_counter() - begin

    for name, task in tasks.items():
        states[name], _ = task.steps(states[name], 0, 0)  # compiles
        counts[name] = max(1, min(_STEPS_A_ROUND, int(_SECONDS_A_ROUND / run(name, 1))))
    for _ in range(_ROUNDS_TO_TIME):
        for name, count in counts.items():
            seconds[name].append(run(name, count) / count)
    return {name: _quartiles(1e3 * np.array(found)) for name, found in seconds.items()}


def _quartiles(values: Any) -> list[float]:
    return [round(float(x), 3) for x in np.quantile(values, (0.25, 0.5, 0.75))]


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


def _entry(task: Task, swept: Mapping[float, float], runs: Sequence[Sequence[Row]]) -> Entry:
    ends = [rows[-1] for rows in runs if rows]
    return Entry(
        task.config.recipe,
        KNOWN[task.config.recipe].family if task.config.recipe in KNOWN else "",
        task.config.settings(),
        task.config.learning_rate,
        {f"{rate:g}": x if math.isfinite(x) else None for rate, x in swept.items()},
        {c.name: [end[c.name] for end in ends] for c in task.columns if len(ends) == len(runs)},
        _bytes(task),
        _quartiles([row["step_ms"] for rows in runs for row in rows] or [math.nan]),
    )


def _write(
    found: Comparison, runs: Mapping[str, list[list[Row]]], task: Task, folder: pathlib.Path
) -> str:
    found.save(folder)
    table = found.table()
    (folder / TABLE).write_text(f"{found.about}\n\n{table}")
    if whole := {name: runs[name] for name in found.whole}:
        plots.draw_comparison(task, whole, found.title, folder)
        frontier.draw(found, folder)
    return table


def _bytes(task: Task) -> int:
    leaves = jax.tree.leaves(task.abstract_state().opt_state)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
