"""The options of `train` and `compare`: those of every run, and those of each task."""

import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from optax_structured.cli import common
from optax_structured.training.config import Config, given_only
from optax_structured.training.folder import CONFIG, quoted, stored_fields
from optax_structured.training.task import Task
from optax_structured.training.tasks import DEFAULT, TASKS, find

Function = TypeVar("Function", bound=Callable[..., Any])

TaskName = Annotated[
    str | None, common.option(f"One of {', '.join(TASKS)}; default {DEFAULT}.", "--task")
]
Out = Annotated[pathlib.Path | None, common.option("Run folder; default runs/ and the names.")]


def of_tasks(*, leaving_out: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Gives a command, instead of `**given`, every option of every task."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        kind = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(name, kind, default=None, annotation=annotation)
            for name, annotation in _annotations().items()
            if name not in leaving_out
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return function

    return decorate


def _annotations() -> dict[str, Any]:
    """Of the options by name; those of all tasks come first, and have no panel.

    What another task means by the same name follows in the line of help.
    """
    kinds: dict[str, Any] = {}
    panels: dict[str, str | None] = {}
    texts: dict[str, list[str]] = {}
    configs = [(Config, "")] + [(task.config_type, task.name) for task in TASKS.values()]
    for config, task in configs:
        hints = typing.get_type_hints(config)
        for name, field in config.options().items():
            kinds.setdefault(name, hints[name])
            panels.setdefault(name, f"Task {task}" if task else None)
            text, known = field.metadata["help"], texts.setdefault(name, [])
            if not any(said.endswith(text) for said in known):
                known.append(f"For {task}: {text}" if known else text)
    return {
        name: Annotated[
            # Numbers separated by commas are text on the command line.
            str | None if typing.get_origin(kind) is tuple else kind | None,
            common.option(" ".join(texts[name]), f"--{name.replace('_', '-')}", panel=panels[name]),
        ]
        for name, kind in kinds.items()
    }


def kinds(config: type[Config]) -> dict[str, Callable[[str], Any]]:
    """What makes a value of a recipe's own options from its text."""
    hints = typing.get_type_hints(config)
    return {name: _plain(hints[name]) for name in config.own()}


def _plain(hint: Any) -> Any:
    """`int` of `int | None`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in hint.__args__ if part is not types.NoneType)
    return hint


def task_of(
    name: str | None, recipes: list[str], given: Mapping[str, Any]
) -> tuple[type[Task], dict[str, Any]]:
    """The task, and the options that were given for it.

    Raises:
      ValueError: an unknown task, or a recipe or an option of another one.
    """
    task = find(name)
    for recipe in recipes:
        task = find(name, recipe)
    chosen = given_only(given)
    for option in chosen:
        if option not in task.config_type.options():
            raise ValueError(
                f"--{option.replace('_', '-')} has no meaning for the task {task.name}; leave it "
                "out, or choose another --task"
            )
    if "milestones" in chosen:
        chosen["milestones"] = common.numbers("--milestones", chosen["milestones"], int)
    return task, chosen


def stored_task(run: pathlib.Path, asked: str | None) -> str:
    """The task of a run folder.

    Raises:
      ValueError: another one was asked for.
    """
    task: str = stored_fields(run).get("task", DEFAULT)
    if asked not in (None, task):
        raise ValueError(f"{run} holds a run of the task {task}, not {asked}")
    return task


def stored_tasks(folder: pathlib.Path, asked: str | None) -> str | None:
    """The task of all runs in a folder; raises as `stored_task`."""
    runs = sorted(config.parent for config in folder.glob(f"*/{CONFIG}"))
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds no runs to continue: begin with --out {quoted(folder)}"
        )
    for run in runs:
        asked = stored_task(run, asked)
    return asked
