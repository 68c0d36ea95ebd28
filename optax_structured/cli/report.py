"""`optax-structured report`: a run folder as one HTML file."""

import pathlib
from typing import Annotated

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.training import run
from optax_structured.training.page import write_page
from optax_structured.training.tasks import find


def report(
    folder: Annotated[pathlib.Path, typer.Argument(help="Of a run, finished or not.")],
) -> None:
    """Write one HTML file about a run: curves, layers, kernels, bytes, and how to run it again."""
    with common.sentences() as console:
        task = run.stored(find(options.stored_task(folder, None)), folder, {})
        console.print(escape(f"Written to {write_page(task, folder)}"), soft_wrap=True)
