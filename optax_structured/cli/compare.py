"""`optax-structured compare`: several recipes of one task side by side."""

import pathlib
from typing import Annotated, Any

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.training.compare import Stopped, check_budget
from optax_structured.training.compare import compare as run_all
from optax_structured.training.folder import quoted
from optax_structured.training.run import new
from optax_structured.training.task import Task
from optax_structured.training.tasks import TASKS, find

_COMPARED = " ".join(f"For {task.name} {task.compared}." for task in TASKS.values())


@options.of_tasks(leaving_out=("seed", "learning_rate"))
def compare(
    task: options.TaskName = None,
    recipes: Annotated[
        str | None,
        common.option(
            f"Names, separated by commas. By default: {_COMPARED} The same recipe twice: "
            "ramda,ramda@strong (and --set ramda@strong.strength=1e-2), or, with 8 bits of state, "
            "galore,galore:8."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Numbers, separated by commas.")] = "0,1,2",
    learning_rates: Annotated[
        str | None,
        common.option(
            "Swept for each recipe on the first seed, as 3e-4,1e-3; by default the recipe's own "
            "(images), or 0.3, 1, 3 and 10 times it (lm). --set galore.learning_rates=1e-2,3e-2 "
            "for one alone."
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
    **given: Any,
) -> None:
    """Train several recipes from the same seeds on the same data; a table of how they end."""
    with common.sentences() as console:
        common.check_one_folder(resume, out)
        if resume:
            task = options.stored_tasks(resume, task)
        names = common.names(find(task).compared if recipes is None else recipes)
        kind, chosen = options.task_of(task, [_parsed(name)[0] for name in names], given)
        shared_rates = common.numbers("--learning-rates", learning_rates, float)
        tasks, rates = _tasks(kind, names, settings or [], chosen, shared_rates)
        check_budget(rates)
        numbers = common.numbers("--seeds", seeds, int) or (0,)
        first = tasks[names[0]]
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


def _tasks(
    kind: type[Task],
    names: list[str],
    settings: list[str],
    given: dict[str, Any],
    shared_rates: tuple[float, ...] | None,
) -> tuple[dict[str, Task], dict[str, tuple[float, ...]]]:
    """The task of each name, and its learning rates."""
    kinds = {**options.kinds(kind.config_type), "learning_rates": _rates}
    own = common.own_settings(settings, names, kinds)
    tasks, rates = {}, {}
    for name in names:
        recipe, bits = _parsed(name)
        swept = own[name].pop("learning_rates", shared_rates)
        shared = {k: v for k, v in given.items() if kind.recipes[recipe].takes(k)}
        tasks[name] = made = new(kind, {"recipe": recipe, **shared, **bits, **own[name]})
        rate = made.config.learning_rate
        rates[name] = swept or tuple(float(f"{rate * factor:.3g}") for factor in kind.factors)
    return tasks, rates


def _parsed(name: str) -> tuple[str, dict[str, int]]:
    """The recipe and the bits of its state in RECIPE:BITS@LABEL, where both ends may be missing."""
    recipe, separator, bits = name.partition("@")[0].partition(":")
    if not separator:
        return recipe, {}
    if not bits.isdecimal():
        raise ValueError(f"--recipes {name}: after the colon come the bits of the state, as in :8")
    return recipe, {"state_bits": int(bits)}


def _rates(text: str) -> tuple[float, ...]:
    return common.numbers("learning_rates", text, float) or ()
