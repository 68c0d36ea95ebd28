"""What a person sees of a run: live progress, the per-layer table, pictures, comparisons."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from optax_structured.diagnostics import LayerRow

matplotlib.use("Agg")  # before pyplot: pictures go to files, a display is not needed

from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

Row = Mapping[str, float]
Strips = Mapping[str, Sequence[np.ndarray]]

_DEAD, _ALIVE, _INK, _GREY = "#efe6d2", "#12525e", "#22313a", "#8a949a"
_COLOURS = ("#12525e", "#d1603d", "#7a5195", "#4f8f3a", "#c9a227", "#5b6670")
_STYLE = {
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

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
    console: Console, label: str, total: int, regularizer: str
) -> Iterator[Callable[[Row], None]]:
    """A live line of a run; the context is the function that takes the latest metrics.

    Args:
      console: where to draw.
      label: what is running.
      total: steps of the run.
      regularizer: decides which sparsity is shown.
    """
    key, _ = measure(regularizer)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, shown="compiling")

        def watch(row: Row) -> None:
            accuracy = f"{row['accuracy']:.2%}" if "accuracy" in row else "–"
            shown = (
                f"loss {row['loss']:.4f}  acc {accuracy}  "
                f"zero W {row[key]:.1%} Ŵ {row['point_' + key]:.1%}  "
                f"{row['steps_per_second']:.0f} step/s"
            )
            bar.update(task, completed=row["step"], shown=shown)

        yield watch


def layer_table(of_w: Sequence[LayerRow], of_point: Sequence[LayerRow], strength: float) -> Table:
    """One line a leaf: what is zero in W and in the prox point, and how near to life it is."""
    table = Table(title="Layers", title_justify="left", header_style="bold")
    table.add_column("parameter")
    table.add_column("shape", justify="right")
    table.add_column("regularizer")
    for name in ("pieces", "left in W", "left in Ŵ", "zero in W", "zero in Ŵ", "‖∇‖*/strength"):
        table.add_column(name, justify="right")
    for w, point in zip(of_w, of_point, strict=True):
        spec = "–" if w.regularizer is None else type(w.regularizer).__name__
        ratio = (
            "–" if w.strength_max is None or not strength else f"{w.strength_max / strength:.3f}"
        )
        table.add_row(
            w.path,
            "×".join(map(str, w.shape)),
            spec,
            str(w.pieces),
            str(int(w.alive)),
            str(int(point.alive)),
            f"{1 - int(w.alive) / w.pieces:.1%}",
            f"{1 - int(point.alive) / w.pieces:.1%}",
            ratio,
        )
    return table


def plot_training(
    rows: Sequence[Row], regularizer: str, milestones: Sequence[int], title: str, path: pathlib.Path
) -> None:
    """Loss, test accuracy and structure over the steps, of W and of the prox point."""
    key, name = measure(regularizer)
    steps = [row["step"] for row in rows]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(3, 1, figsize=(7.5, 7.5), sharex=True, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        panels = (("training loss", "loss"), ("test accuracy", "accuracy"), (name, key))
        for ax, (heading, column) in zip(axes, panels, strict=True):
            ax.set_title(heading)
            ax.plot(steps, [row[column] for row in rows], color=_COLOURS[0], label="parameters W")
            if column == "loss":
                ax.set_yscale("log")
            else:
                point = [row[f"point_{column}"] for row in rows]
                ax.plot(steps, point, color=_COLOURS[1], ls="--", label="prox point Ŵ")
                ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            for milestone in milestones:
                ax.axvline(milestone, color=_GREY, lw=0.8, ls=":")
        axes[1].legend(loc="lower right")
        axes[2].set_ylim(-0.02, 1.02)
        axes[2].set_xlabel("step (dotted: next stage)" if milestones else "step")
        _save(figure, path)


def plot_layers(
    strips: Strips, regularizer: str, milestones: Sequence[int], title: str, path: pathlib.Path
) -> None:
    """One heat-map a layer: which of its inputs (or singular values) live, epoch by epoch."""
    pieces = "singular values" if regularizer == "nuclear" else "inputs"
    colours = LinearSegmentedColormap.from_list("life", [_DEAD, _ALIVE])
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            len(strips),
            1,
            figsize=(7.5, 0.9 + 1.5 * len(strips)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for ax, (name, strip) in zip(axes[:, 0], _in_order(strips), strict=True):
            life = np.stack(strip, axis=1)  # (pieces, epochs)
            longest_first = np.argsort(-life.sum(axis=1), kind="stable")
            epochs, left = life.shape[1], int(np.count_nonzero(life[:, -1]))
            ax.imshow(
                life[longest_first],
                aspect="auto",
                cmap=colours,
                vmin=0,
                vmax=1,
                interpolation="nearest" if len(life) <= 100 else "antialiased",
                extent=(0, epochs, len(life), 0),
            )
            ax.set_title(f"{name}:  {left} of {len(life)} {pieces} left")
            ax.set_yticks([0, len(life)])
            for milestone in milestones:
                ax.axvline(milestone, color=_COLOURS[1], lw=0.9, ls=":")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (_ALIVE, _DEAD)]
        figure.legend(handles, ["alive", "exactly zero"], loc="upper right", ncols=2)
        axes[-1, 0].set_xlabel(f"epoch; {pieces} ordered by how long they live")
        _save(figure, path)


def plot_comparison(
    runs: Mapping[str, Sequence[Sequence[Row]]],
    regularizer: str,
    milestones: Sequence[int],
    title: str,
    path: pathlib.Path,
) -> None:
    """Accuracy and structure of several recipes: mean over seeds, band from least to most."""
    key, name = measure(regularizer)
    panels = (
        ("test accuracy of W", "accuracy"),
        (f"{name} of W", key),
        (f"{name} of Ŵ", f"point_{key}"),
    )
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for ax, (heading, column) in zip(axes, panels, strict=True):
            ax.set_title(heading)
            finals = []
            for colour, (recipe, seeds) in zip(_cycle(_COLOURS), runs.items(), strict=False):
                values = np.array([[row[column] for row in rows] for rows in seeds])
                steps = [row["step"] for row in seeds[0]]
                ax.plot(steps, values.mean(axis=0), color=colour, label=recipe)
                ax.fill_between(
                    steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0
                )
                finals.append(values[:, -max(1, values.shape[1] * 3 // 4) :])
            for milestone in milestones:
                ax.axvline(milestone, color=_GREY, lw=0.8, ls=":")
            ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            ax.set_xlabel("step")
            if column == "accuracy":  # the first quarter of a run would flatten the rest
                ax.set_ylim(np.min([f.min() for f in finals]) - 0.01, None)
            else:
                ax.set_ylim(-0.02, 1.02)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        _save(figure, path)


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


def _in_order(strips: Strips) -> list[tuple[str, Sequence[np.ndarray]]]:
    """Convolutions before dense layers, as in the networks here."""
    return sorted(strips.items(), key=lambda item: (not item[0].startswith("Conv"), item[0]))


def _cycle(colours: Sequence[str]) -> Iterator[str]:
    while True:
        yield from colours


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.savefig(path)
    plt.close(figure)
