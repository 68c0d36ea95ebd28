"""`optax-structured compact`: a trained run as a smaller program."""

import pathlib
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.compact import compact as cut
from optax_structured.compact import draw, save
from optax_structured.training import run
from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.task import Task
from optax_structured.training.tasks import find

FOLDER, PICTURE = "compact", "layers.png"


def compact(
    folder: Annotated[pathlib.Path, typer.Argument(help="A run folder of `train`.")],
    out: Annotated[
        pathlib.Path | None, common.option("Where to write; default compact/ in the run folder.")
    ] = None,
    unroll: Annotated[
        bool,
        typer.Option(
            "--unroll", help="Cut each stacked layer by itself, if that saves operations."
        ),
    ] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Parameters as safetensors instead of npz.")
    ] = False,
) -> None:
    """Cut everything dead from the network of a run; write program, parameters and report."""
    with common.sentences() as console:
        task = run.stored(find(options.stored_task(folder, None)), folder, {})
        write(task, folder, out or folder / FOLDER, console, unroll, safetensors)


def write(
    task: Task,
    folder: pathlib.Path,
    out: pathlib.Path,
    console: Console,
    unroll: bool = False,
    safetensors: bool = False,
) -> None:
    """The smaller program of a run, from its last checkpoint."""
    with Checkpoints(folder) as saved:
        _, state = saved.restore(task.abstract_state())
    fn, params, inputs = task.network(state)
    made = cut(fn, params, *inputs, unroll=unroll, measure=True)
    save(out, made, *inputs, safetensors=safetensors)
    draw(made.report).savefig(out / PICTURE)
    console.print(escape(str(made.report)), soft_wrap=True)
    console.print(escape(f"Written to {out}"))
