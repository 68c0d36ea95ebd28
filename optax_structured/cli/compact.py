"""`optax-structured compact`: a trained run as a smaller program."""

import pathlib
from typing import Annotated

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.compact import compact as cut
from optax_structured.compact import save
from optax_structured.training import run
from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.tasks import find


def compact(
    folder: Annotated[pathlib.Path, typer.Argument(help="A run folder of `train`.")],
    out: Annotated[
        pathlib.Path | None, common.option("Where to write; default compact/ in the run folder.")
    ] = None,
    unroll: Annotated[
        bool, typer.Option("--unroll", help="Cut in stacked layers too, each written out.")
    ] = False,
) -> None:
    """Cut everything dead from the network of a run; write StableHLO, parameters and report."""
    with common.sentences() as console:
        kind = find(options.stored_task(folder, None))
        task = run.stored(kind, folder, {})
        with Checkpoints(folder) as saved:
            _, state = saved.restore(task.abstract_state())
        fn, params, inputs = task.network(state)
        made = cut(fn, params, *inputs, unroll=unroll)
        out = out or folder / "compact"
        save(out, made, *inputs)
        console.print(escape(str(made.report)), soft_wrap=True)
        console.print(escape(f"Written to {out}"))
