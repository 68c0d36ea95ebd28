"""One run with a live line, from its options to its report."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from optax_structured.training import loop, plots, report
from optax_structured.training.config import check_same, given_only
from optax_structured.training.devices import Devices
from optax_structured.training.folder import load_config
from optax_structured.training.task import Task
from optax_structured.trees import rules


def new(kind: type[Task], given: Mapping[str, Any], mesh: Mapping[str, int] | None = None) -> Task:
    """The task of a new run, from the options that were given; None counts as not given."""
    defaults = {name: field.default for name, field in kind.config_type.options().items()}
    data, facts = kind.load({**defaults, **given_only(given)})
    return _made(kind, kind.config_type(**given_only(given), **facts), data, mesh)


def stored(
    kind: type[Task],
    folder: pathlib.Path,
    given: Mapping[str, Any],
    mesh: Mapping[str, int] | None = None,
) -> Task:
    """The task of a run folder, longer if a greater length was given; on any mesh.

    Raises:
      ValueError: something else was asked for than what the run has, or other data were found.
    """
    config, length, given = load_config(folder, kind.config_type), f"{kind.unit}s", dict(given)
    if (given.get(length) or 0) > getattr(config, length):
        config = config.extended(given.pop(length))
    moved = given.pop(kind.located, None)
    if moved is not None:
        config = dataclasses.replace(config, **{kind.located: moved})
    check_same(config, given)
    data, facts = kind.load(vars(config))
    if any(getattr(config, name) != value for name, value in facts.items()):
        flag = f"--{kind.located.replace('_', '-')}"
        raise ValueError(f"these are not the data of the run in {folder}: give them with {flag}")
    return _made(kind, config, data, mesh)


def _made(kind: type[Task], config: Any, data: Any, mesh: Mapping[str, int] | None) -> Task:
    if not mesh:
        return kind(config, data)
    if not kind.takes_mesh:
        raise ValueError(
            f"--mesh has no meaning for the task {kind.name}, which trains on one device: leave it "
            "out, or choose --task lm"
        )
    made: Any = kind
    return made(config, data, Devices(mesh))


def default_name(task: Task) -> str:
    """The run folder in runs/."""
    return "-".join((task.label, *task.subject, str(task.config.seed)))


def announce(task: Task, console: Console) -> None:
    """Prints what is about to run."""
    chosen = task.config
    console.print(escape(f"{chosen.recipe}: {task.describe()}, seed {chosen.seed}"))
    listed = (f"learning rate {chosen.learning_rate:g}", chosen.settings())
    console.print(escape(", ".join(filter(None, listed))))
    task.announce(console)


def table_of_rules(task: Task) -> str:
    """Which leaf gets what; without rules, what the parameters are."""
    params = task.abstract_state().params
    return (task.structure or rules(default=None)).table(params)


def run(
    task: Task,
    folder: pathlib.Path,
    console: Console,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> loop.Result:
    """Trains with a live line."""
    label = f"{task.label} {task.config.seed}"
    with report.progress(console, label, task.total_steps, task.describe_row) as watch:
        return loop.train(
            task,
            folder,
            resume=resume,
            stop_after=stop_after,
            stopped=stopped,
            watch=watch,
            warn=lambda sentence: console.print(escape(f"Warning: {sentence}.")),
        )


def describe(task: Task, result: loop.Result, folder: pathlib.Path, console: Console) -> None:
    """Prints how the run ended and draws it."""
    task.report(result.state, result.history, folder, console)
    if rows := result.history.rows:
        ends = (
            f"{column.heading} {column.ends([rows[-1][column.name]])}" for column in task.columns
        )
        console.print(f"{', '.join(ends)}; {rows[-1]['step_ms']:.1f} ms a step")
        plots.draw_training(task, result.history, folder)
