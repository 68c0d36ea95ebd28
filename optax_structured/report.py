"""What a person reads of a run: live progress, the per-layer table, the table of several runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from optax_structured.diagnostics import LayerRow
from optax_structured.memory import MemoryReport

Row = Mapping[str, float]

# The one number a regularizer is judged by, and its name.
_MEASURES = {
    "group_lasso": ("weighted", "weighted group sparsity"),
    "l1": ("weighted", "sparsity of the kernels"),
    "nuclear": ("low_rank", "low-rank level"),
    "none": ("unstructured", "sparsity"),
}


def measure(regularizer: str) -> tuple[str, str]:
    """The metric that says how structured a run is, and what to call it."""
    return _MEASURES[regularizer]


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


def structure_line(row: Row, regularizer: str) -> str:
    """Where a run of the image job stands."""
    key, _ = measure(regularizer)
    accuracy = f"{row['accuracy']:.1%}" if "accuracy" in row else "–"
    return (
        f"loss {row['loss']:.3f}  acc {accuracy}  "
        f"zero {row[key]:.0%} (Ŵ {row['point_' + key]:.0%})  "
        f"{row['steps_per_second']:.0f}/s"
    )


def text_line(row: Row, state_bytes: int) -> str:
    """Where a run of the language-model job stands."""
    perplexity = f"{row['perplexity']:.3f}" if "perplexity" in row else "–"
    return (
        f"loss {row['loss']:.3f}  perplexity {perplexity}  "
        f"{row['tokens_per_second']:,.0f} tokens/s  state {state_bytes:,} B"
    )


def layer_table(of_w: Sequence[LayerRow], of_point: Sequence[LayerRow], strength: float) -> Table:
    """One line a leaf: how many entries, groups or singular values are left; plain leaves dim."""
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
    """One line a leaf: its rank and what the optimizer keeps for it; plain leaves dim."""
    table = Table(
        title="Bytes of weights and optimizer state",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("parameter", overflow="fold")
    for name in ("shape", "rank", "weights", "state", "in codes"):
        table.add_column(name, justify="right", no_wrap=True)
    for leaf in memory.leaves:
        rank = "" if leaf.spec is None else str(leaf.spec.rank)
        numbers = (leaf.weight_bytes, leaf.state_bytes, leaf.code_bytes)
        shape = "×".join(map(str, leaf.shape))
        style = "dim" if leaf.spec is None else None
        table.add_row(leaf.path, shape, rank, *map("{:,}".format, numbers), style=style)
    table.add_row("counters", "", "", "", f"{memory.shared_bytes:,}", "", style="dim")
    table.add_section()
    total = (memory.weight_bytes, memory.state_bytes, memory.code_bytes)
    table.add_row("total", "", "", *map("{:,}".format, total))
    return table


def comparison_markdown(
    runs: Mapping[str, Sequence[Sequence[Row]]],
    settings: Mapping[str, str],
    regularizer: str,
) -> str:
    """A table with one line a recipe: the end of each run, mean ± standard deviation over seeds."""
    key, name = measure(regularizer)
    columns = (
        ("test accuracy, W", "accuracy"),
        (f"{name}, W", key),
        ("test accuracy, Ŵ", "point_accuracy"),
        (f"{name}, Ŵ", f"point_{key}"),
    )
    lines = [
        f"| recipe | {' | '.join(heading for heading, _ in columns)} | settings |",
        f"|---|{'---:|' * len(columns)}---|",
    ]
    for recipe, seeds in runs.items():
        cells = []
        for _, column in columns:
            last = 100 * np.array([rows[-1][column] for rows in seeds])
            spread = f" ± {last.std(ddof=1):.2f}" if len(last) > 1 else ""
            cells.append(f"{last.mean():.2f}{spread} %")
        lines.append(f"| {recipe} | {' | '.join(cells)} | {settings[recipe]} |")
    return "\n".join(lines) + "\n"


class RecipeLine(NamedTuple):
    """One recipe of a comparison of language models."""

    name: str
    perplexities: Sequence[float]  # a seed each
    learning_rate: float
    at_edge: bool  # of the learning rates that were tried
    state_bytes: int
    step_ms: float
    ratio: float | None  # of the step to that of adamw; None where adamw did not run
    settings: str


def perplexity_markdown(recipes: Sequence[RecipeLine]) -> str:
    """A table with one line a recipe: perplexity, mean ± standard error over seeds, and costs."""
    lines = [
        "| recipe | held-out perplexity | learning rate | state bytes | step, ms | of adamw's "
        "| settings |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for line in recipes:
        values, n = np.array(line.perplexities), len(line.perplexities)
        error = f" ± {values.std(ddof=1) / np.sqrt(n):.3f}" if n > 1 else ""
        edge = " (edge)" if line.at_edge else ""
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        lines.append(
            f"| {line.name} | {values.mean():.3f}{error} | {line.learning_rate:g}{edge} "
            f"| {line.state_bytes:,} | {line.step_ms:.1f} | {ratio} | {line.settings} |"
        )
    return "\n".join(lines) + "\n"
