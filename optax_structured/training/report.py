"""What a person reads of a run: live progress, the per-layer tables."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from optax_structured.diagnostics import LayerRow
from optax_structured.memory import MemoryReport
from optax_structured.trees.tables import kinds

Row = dict[str, Any]


@contextlib.contextmanager
def progress(
    console: Console, label: str, total: int, describe: Callable[[Row], str]
) -> Iterator[Callable[[Row], None]]:
    """A live line of a run; the context is the function that takes the latest metrics.

    Args:
      console: where to draw.
      label: what is running.
      total: steps of the run.
      describe: the metrics in a few words.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:.0f}%"),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, shown="compiling")

        def watch(row: Row) -> None:
            bar.update(task, completed=row["step"], shown=describe(row))

        yield watch


def layer_table(of_w: Sequence[LayerRow], of_point: Sequence[LayerRow], strength: float) -> Table:
    """One line per leaf: how many entries, groups or singular values are left; plain leaves dim."""
    table = Table(title="Layers", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", overflow="fold")
    for name in ("shape", "W left", "Ŵ left", "W zero", "Ŵ zero", "gradient"):
        table.add_column(name, justify="right", no_wrap=True)
    for w, point in zip(of_w, of_point, strict=True):
        left = [f"{int(row.alive)}/{row.pieces}" for row in (w, point)]
        zero = [f"{1 - int(row.alive) / row.pieces:.1%}" for row in (w, point)]
        held = w.strength_max
        gradient = "" if held is None or strength == 0 else f"{held / strength:.3f}"
        dim = None if w.regularizer is not None else "dim"
        shape = "×".join(map(str, w.shape))
        table.add_row(w.path, shape, *left, *zero, gradient, style=dim)
    if strength > 0:
        table.caption = "gradient: its dual norm over the strength, 1 at a stationary point"
        table.caption_justify = "left"
    return table


def state_table(memory: MemoryReport) -> Table:
    """Rank and bytes, one line for leaves that differ in numbers only; plain leaves dim."""
    table = Table(
        title="Bytes of weights and optimizer state",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("parameter", overflow="fold")
    for name in ("shape", "rank", "weights", "state", "in codes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, leaves in kinds(memory.leaves, lambda leaf: (leaf.shape, leaf.spec)):
        spec, shape = leaves[0].spec, "×".join(map(str, leaves[0].shape))
        rank = "" if spec is None else str(spec.rank)
        sizes = zip(*((x.weight_bytes, x.state_bytes, x.code_bytes) for x in leaves), strict=True)
        numbers = map("{:,}".format, map(sum, sizes))
        table.add_row(name, shape, rank, *numbers, style="dim" if spec is None else None)
    table.add_row("counters", "", "", "", f"{memory.shared_bytes:,}", "", style="dim")
    table.add_section()
    total = (memory.weight_bytes, memory.state_bytes, memory.code_bytes)
    table.add_row("total", "", "", *map("{:,}".format, total))
    if memory.notes:
        table.caption = "\n".join(memory.notes)
        table.caption_justify = "left"
    return table
