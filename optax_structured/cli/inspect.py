"""`optax-structured inspect`: is the learning rate of a finished run sane?"""

import pathlib
from typing import Annotated

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.training import inspection, run
from optax_structured.training.history import History
from optax_structured.training.tasks import find


def inspect(
    folder: Annotated[pathlib.Path, typer.Argument(help="A run folder of `train`.")],
    order: Annotated[int, typer.Option(help="Products a probe: sharper spectra cost more.")] = 32,
    probes: Annotated[int, typer.Option(help="Random vectors that the spectrum averages.")] = 1,
) -> None:
    """Draw spectrum, stability limit, sign agreement and captured energy of a run as one page."""
    with common.sentences() as console:
        kind = find(options.stored_task(folder, None))
        task = run.stored(kind, folder, {})
        found = inspection.inspect(task, folder, order=order, probes=probes)
        inspection.draw(task, found, History.read(folder, found.step), folder)
        console.print(escape(found.describe()), soft_wrap=True)
        console.print(escape(f"Written to {folder / inspection.PICTURE}"))
