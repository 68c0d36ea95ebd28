"""What a person sees of a run: live progress, the per-layer table, pictures, comparisons."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from optax_structured.diagnostics import LayerRow

matplotlib.use("Agg")  # before pyplot: pictures go to files, a display is not needed

from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch

Row = Mapping[str, float]
Strips = Mapping[str, Sequence[np.ndarray]]

_DEAD, _ALIVE, _INK, _GREY = "#efe6d2", "#12525e", "#22313a", "#8a949a"
_COLOURS = ("#12525e", "#d1603d", "#7a5195", "#4f8f3a", "#c9a227", "#5b6670")
_STYLE: dict[Any, Any] = {
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
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:.0f}%"),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, shown="compiling")

        def watch(row: Row) -> None:
            accuracy = f"{row['accuracy']:.1%}" if "accuracy" in row else "–"
            shown = (
                f"loss {row['loss']:.3f}  acc {accuracy}  "
                f"zero {row[key]:.0%} (Ŵ {row['point_' + key]:.0%})  "
                f"{row['steps_per_second']:.0f}/s"
            )
            bar.update(task, completed=row["step"], shown=shown)

        yield watch


def layer_table(of_w: Sequence[LayerRow], of_point: Sequence[LayerRow], strength: float) -> Table:
    """One line a leaf: how many entries, groups or singular values are left; plain leaves dim."""
    table = Table(title="Layers", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", no_wrap=True)
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
        layers = _in_order(strips)
        heights = [min(1.0, max(0.2, len(strip[0]) / 16)) for _, strip in layers]
        figure, axes = plt.subplots(
            len(layers),
            1,
            figsize=(7.5, 0.9 + 0.45 * len(layers) + 1.15 * sum(heights)),
            height_ratios=heights,
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for ax, (name, strip) in zip(axes[:, 0], layers, strict=True):
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
        handles = [Patch(color=colour) for colour in (_ALIVE, _DEAD)]
        figure.legend(handles, ["alive in Ŵ", "exactly zero"], loc="outside lower center", ncols=2)
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
            for i, (recipe, seeds) in enumerate(runs.items()):
                colour, width = _COLOURS[i % len(_COLOURS)], 1.4 + 0.8 * (len(runs) - 1 - i)
                values = np.array([[row[column] for row in rows] for rows in seeds])
                steps = [row["step"] for row in seeds[0]]
                # Earlier lines are wider, so that those which coincide can all be seen.
                ax.plot(steps, values.mean(axis=0), color=colour, lw=width, label=recipe)
                ax.fill_between(
                    steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0
                )
                finals.append(values[:, -max(1, values.shape[1] * 3 // 4) :])
            for milestone in milestones:
                ax.axvline(milestone, color=_GREY, lw=0.8, ls=":")
            ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            ax.set_xlabel("step")
            if column == "accuracy":  # the first quarter of a run would flatten the rest
                low, high = min(f.min() for f in finals), max(f.max() for f in finals)
                ax.set_ylim(low - 0.01, min(high + 0.01, 1.0))
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


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.savefig(path)
    plt.close(figure)
