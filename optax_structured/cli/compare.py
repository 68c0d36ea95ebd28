"""`optax-structured compare`: several recipes of one task side by side."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.training import frontier
from optax_structured.training.compare import Stopped, check_budget
from optax_structured.training.compare import compare as run_all
from optax_structured.training.comparison import load
from optax_structured.training.folder import quoted
from optax_structured.training.run import new
from optax_structured.training.task import Task
from optax_structured.training.tasks import TASKS, find

_COMPARED = " ".join(
    f"For {task.name} {', '.join(task.compared.split(','))}." for task in TASKS.values()
)


@options.of_tasks(leaving_out=("seed", "learning_rate"))
def compare(
    task: options.TaskName = None,
    recipes: Annotated[
        str | None,
        common.option(
            f"Names, separated by commas. By default: {_COMPARED} Or all: every recipe of the "
            "task, and what people would otherwise take."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Numbers, separated by commas.")] = "0,1,2",
    learning_rates: Annotated[
        str | None,
        common.option(
            "Swept for each recipe on the first seed, as 3e-4,1e-3; by default the recipe's own "
            "(images), or 0.3, 1, 3 and 10 times it (lm)."
        ),
    ] = None,
    strengths: Annotated[
        str | None,
        common.option(
            "Of the penalty, as 1e-4,1e-3: each recipe that has one runs with all of them (images)."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        common.option("RECIPE.NAME=VALUE, as ramda.momentum=0.9; may be repeated.", "--set"),
    ] = None,
    out: options.Out = None,
    resume: Annotated[
        pathlib.Path | None, common.option("Continue the comparison in this folder, same options.")
    ] = None,
    redraw: Annotated[
        pathlib.Path | None,
        common.option("Run nothing: print the table of this comparison.json, and draw it again."),
    ] = None,
    **given: Any,
) -> None:
    """Train several recipes from the same seeds on the same data; a table of how they end.

    frontier.png shows how they end against what they cost: state and time, or zeros.

    galore:8 is galore with its state in 8 bits. The same recipe twice is ramda,ramda@strong with
    --set ramda@strong.strength=1e-2. To sweep something else for one of them: --set
    ramda.learning_rates=1e-2,3e-2, and likewise strengths.
    """
    with common.sentences() as console:
        if redraw:
            found = load(redraw)
            folder = out or (redraw if redraw.is_dir() else redraw.parent)
            frontier.draw(found, folder)
            console.print(found.table(), markup=False, soft_wrap=True)
            console.print(escape(f"Written to {folder / frontier.PICTURE}"))
            return
        common.check_one_folder(resume, out)
        if resume:
            task = options.stored_tasks(resume, task)
        names = _names(find(task), recipes)
        kind, chosen = options.task_of(task, [_parsed(name)[0] for name in names], given)
        swept = {
            "learning_rates": common.numbers("--learning-rates", learning_rates, float),
            "strengths": common.numbers("--strengths", strengths, float),
        }
        tasks, rates = _tasks(kind, names, settings or [], chosen, swept)
        check_budget(rates)
        numbers = common.numbers("--seeds", seeds, int) or (0,)
        first = next(iter(tasks.values()))
        folder = resume or out or pathlib.Path("runs") / "-".join(("compare", *first.subject))
        console.print(escape(first.describe()))
        with common.interrupts(console) as stopped:
            try:
                table = run_all(
                    tasks, rates, numbers, folder, console, resume=bool(resume), stopped=stopped
                )
            except Stopped:
                common.leave(console, f"the same options and --resume {quoted(folder)}")
        console.print(f"\n{table}", markup=False, soft_wrap=True)
        console.print(escape(f"Written to {folder}"))


def _names(task: type[Task], recipes: str | None) -> list[str]:
    if recipes == "all":
        return [*task.recipes, *task.also_compared]
    return common.names(task.compared if recipes is None else recipes)


def _tasks(
    kind: type[Task],
    names: list[str],
    settings: list[str],
    given: dict[str, Any],
    swept: Mapping[str, tuple[float, ...] | None],
) -> tuple[dict[str, Task], dict[str, tuple[float, ...]]]:
    """The task of each name, and its learning rates."""
    lists = {name: functools.partial(_numbers, name) for name in swept}
    own = common.own_settings(settings, names, {**options.kinds(kind.config_type), **lists})
    tasks, rates = {}, {}
    for name in names:
        recipe, bits = _parsed(name)
        of_rate, strengths = (own[name].pop(x, shared) for x, shared in swept.items())
        shared = {k: v for k, v in given.items() if kind.recipes[recipe].takes(k)}
        one = {"recipe": recipe, **shared, **bits, **own[name]}
        several = strengths if strengths and kind.recipes[recipe].takes("strength") else (None,)
        for strength in several:
            made = new(kind, {**one, **({"strength": strength} if strength is not None else {})})
            label = name if strength is None else f"{name}@{strength:g}"
            rate = made.config.learning_rate
            tasks[label] = made
            rates[label] = of_rate or tuple(
                float(f"{rate * factor:.3g}") for factor in kind.factors
            )
    return tasks, rates


def _parsed(name: str) -> tuple[str, dict[str, int]]:
    """The recipe and the bits of its state in RECIPE:BITS@LABEL, where both ends may be missing."""
    recipe, separator, bits = name.partition("@")[0].partition(":")
    if not separator:
        return recipe, {}
    if not bits.isdecimal():
        raise ValueError(f"--recipes {name}: after the colon come the bits of the state, as in :8")
    return recipe, {"state_bits": int(bits)}


def _numbers(option: str, text: str) -> tuple[float, ...]:
    return common.numbers(option, text, float) or ()
