"""What a person reads of a run: live progress, the per-layer tables."""

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from optax_structured.diagnostics import LayerRow
from optax_structured.memory import MemoryReport
from optax_structured.trees.tables import aligned, kinds

Row = dict[str, Any]


@contextlib.contextmanager
def progress(
    console: Console, label: str, total: int, describe: Callable[[Row], str]
) -> Iterator[Callable[[Row], None]]:
    """A live line of a run of `total` steps; the context takes the latest metrics.

    `describe` says them in a few words.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:.0f}%"),
        TextColumn("{task.fields[shown]}", table_column=Column(ratio=1, no_wrap=True)),  # the rest
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(label, total=total, shown="compiling")

        def watch(row: Row) -> None:
            bar.update(task, completed=row["step"], shown=describe(row))

        yield watch


def show(console: Console, text: str) -> None:
    """Prints text as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def layer_table(
    of_w: Sequence[LayerRow], of_point: Sequence[LayerRow], strength: float, width: int
) -> str:
    """One row per leaf: how many entries, groups or singular values are left.

    In the parameters and in the prox point; `width` is that of the screen.
    """
    headings = ("parameter", "shape", "W left", "Ŵ left", "W zero", "Ŵ zero", "gradient")
    rows: list[tuple[str, ...]] = [headings]
    for w, point in zip(of_w, of_point, strict=True):
        left = [f"{int(row.alive)}/{row.pieces}" for row in (w, point)]
        zero = [f"{1 - int(row.alive) / row.pieces:.1%}" for row in (w, point)]
        held = w.strength_max
        gradient = "" if held is None or strength == 0 else f"{held / strength:.3f}"
        rows.append((w.path, "×".join(map(str, w.shape)), *left, *zero, gradient))
    parts = ["Layers", aligned(rows, range(1, 7), width)]
    if strength > 0:
        meaning = "gradient: its dual norm over the strength, 1 at a stationary point"
        parts.append(textwrap.fill(meaning, width))
    return "\n".join(parts)


def state_table(memory: MemoryReport, width: int) -> str:
    """Rank and bytes, one row for leaves that differ in numbers only."""
    headings = ("parameter", "shape", "rank", "weights", "state", "in codes")
    rows: list[tuple[str, ...]] = [headings]
    for name, leaves in kinds(memory.leaves, lambda leaf: (leaf.shape, leaf.spec)):
        spec, shape = leaves[0].spec, "×".join(map(str, leaves[0].shape))
        sizes = zip(*((x.weight_bytes, x.state_bytes, x.code_bytes) for x in leaves), strict=True)
        rank = "" if spec is None else str(spec.rank)
        rows.append((name, shape, rank, *map("{:,}".format, map(sum, sizes))))
    rows.append(("counters", "", "", "", f"{memory.shared_bytes:,}", ""))
    total = (memory.weight_bytes, memory.state_bytes, memory.code_bytes)
    rows.append(("total", "", "", *map("{:,}".format, total)))
    notes = (textwrap.fill(note, width) for note in memory.notes)
    table = aligned(rows, range(1, 6), width)
    return "\n".join(("Bytes of weights and optimizer state", table, *notes))
