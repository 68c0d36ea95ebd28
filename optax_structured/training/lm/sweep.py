"""Several recipes on the same text: each at the best of its own learning rates, over seeds."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from optax_structured import report
from optax_structured.training.folder import CONFIG, Row, check_empty, check_same
from optax_structured.training.lm import config, loop, plots, session
from optax_structured.training.lm.experiment import STEPS_A_CALL, Experiment

TABLE, PICTURE = "comparison.md", "comparison.png"
# Of the rate that a recipe starts from; a decade and a half around it, equal for all.
FACTORS = (0.3, 1.0, 3.0, 10.0)
_CALLS_TO_TIME = 12


class Ends(NamedTuple):
    """One recipe after its runs."""

    experiment: Experiment  # at the best learning rate
    swept: dict[float, float]  # learning rate -> held-out perplexity on the first seed
    rows: list[list[Row]]  # a seed each, at the best learning rate
    state_bytes: int
    step_ms: float


def compare(
    experiments: Mapping[str, Experiment],
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    folder: pathlib.Path,
    console: Console,
    *,
    resume: bool = False,
) -> str:
    """Sweeps each learning rate on the first seed, then runs the best from every seed.

    Each run has a folder of its own in `folder`, next to `comparison.md` and `comparison.png`. With
    `resume`, finished runs are read and unfinished ones continued. A run that diverges counts as an
    infinite perplexity.

    Args:
      experiments: by the name that a recipe has in the table.
      rates: learning rates by the same names, as many for each: see `check_budget`.
      seeds: the first is the one of the sweep.
      folder: where to write.
      console: where to say what goes on.
      resume: continue what is in `folder`.

    Returns:
      The table, as markdown.
    """
    if not resume:
        check_empty(folder)
    swept: dict[str, dict[float, float]] = {}
    runs: dict[str, list[list[Row]]] = {}
    best: dict[str, Experiment] = {}
    for name, experiment in experiments.items():
        of_rate = {
            rate: _run(experiment, name, rate, seeds[0], folder, console) for rate in rates[name]
        }
        swept[name] = {rate: perplexity(rows) for rate, rows in of_rate.items()}
        rate = min(of_rate, key=lambda rate: swept[name][rate])
        others = [_run(experiment, name, rate, seed, folder, console) for seed in seeds[1:]]
        runs[name] = [of_rate[rate], *others]
        best[name] = experiment.variant(learning_rate=rate)
    pace = step_ms(best)
    ends = {
        name: Ends(
            best[name],
            swept[name],
            runs[name],
            session.memory_of(best[name]).state_bytes,
            pace[name],
        )
        for name in best
    }
    return _write(ends, seeds, folder)


def check_budget(rates: Mapping[str, Sequence[float]]) -> None:
    """Raises ValueError unless every recipe has equally many learning rates, all different."""
    counts = {name: len(set(values)) for name, values in rates.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"every recipe needs the same number of learning rates, at least one; got {listed}"
        )


def perplexity(rows: Sequence[Row]) -> float:
    """At the end of a run; infinite for one that diverged."""
    return rows[-1]["perplexity"] if rows else math.inf


def step_ms(experiments: Mapping[str, Experiment]) -> dict[str, float]:
    """Median milliseconds a step, the recipes in turn, so that a busy machine slows all alike."""
    states = {name: experiment.init() for name, experiment in experiments.items()}
    clocks = {name: loop.Clock(e.config.tokens_a_step) for name, e in experiments.items()}
    for call in range(-1, _CALLS_TO_TIME):
        for name, experiment in experiments.items():
            if call < 0:  # the first call compiles
                states[name], _ = experiment.steps(states[name], 0, 0)
                continue
            with clocks[name].timing(STEPS_A_CALL):
                first = call * STEPS_A_CALL
                states[name], losses = experiment.steps(states[name], first, STEPS_A_CALL)
                np.asarray(losses)
    return {name: clock.reading()["step_ms"] for name, clock in clocks.items()}


def _run(
    experiment: Experiment,
    name: str,
    rate: float,
    seed: int,
    folder: pathlib.Path,
    console: Console,
) -> list[Row]:
    """The evaluations of one run, new, continued or read; none if it diverged."""
    one = experiment.variant(learning_rate=rate, seed=seed)
    path = folder / f"{name.replace(':', '-')}-{rate:g}-{seed}"
    started = (path / CONFIG).exists()
    if started:
        check_same(config.load(path), vars(one.config), ignoring=("text",))
        if (rows := loop.evaluations(path)) and rows[-1]["step"] == one.config.steps:
            return rows
    try:
        return session.run(one, path, console, resume=started).rows
    except FloatingPointError:
        console.print(f"{name} diverged at learning rate {rate:g}")
        return []


def _write(ends: Mapping[str, Ends], seeds: Sequence[int], folder: pathlib.Path) -> str:
    reference = ends["adamw"].step_ms if "adamw" in ends else None
    lines = [
        report.RecipeLine(
            name,
            [perplexity(rows) for rows in end.rows],
            end.experiment.config.learning_rate,
            at_edge=end.experiment.config.learning_rate in (min(end.swept), max(end.swept))
            and len(end.swept) > 1,
            state_bytes=end.state_bytes,
            step_ms=end.step_ms,
            ratio=None if reference is None else end.step_ms / reference,
            settings=session.settings(end.experiment.config),
        )
        for name, end in ends.items()
    ]
    first = next(iter(ends.values())).experiment
    grids = "\n".join(
        f"- {name}: " + ", ".join(f"{rate:g} → {value:.4g}" for rate, value in end.swept.items())
        for name, end in ends.items()
    )
    heading = f"{session.common_settings(first)}, seeds {', '.join(map(str, seeds))}"
    table = report.perplexity_markdown(lines)
    swept = f"Learning rate → held-out perplexity on seed {seeds[0]}:\n\n{grids}\n"
    (folder / TABLE).write_text(f"{heading}\n\n{table}\n{swept}")
    whole = {name: end.rows for name, end in ends.items() if all(end.rows)}
    if whole:
        title = f"{pathlib.Path(first.config.text).name}, {len(seeds)} seeds"
        plots.draw_comparison(whole, title, folder / PICTURE)
    return f"{table}\n{swept}"
