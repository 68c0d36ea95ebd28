"""Pictures of a run: curves, the life of every layer's inputs, several recipes side by side."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from optax_structured.report import Row, measure
from optax_structured.training.style import COLOURS, GREY, STYLE, figure_of

Strips = Mapping[str, Sequence[np.ndarray]]

_DEAD, _ALIVE = "#efe6d2", "#12525e"


def draw_training(
    rows: Sequence[Row], regularizer: str, milestones: Sequence[int], title: str, path: pathlib.Path
) -> None:
    """Loss, test accuracy and structure over the steps, of W and of the prox point."""
    key, name = measure(regularizer)
    steps = [row["step"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = figure_of(title, 7.5, 7.5)
        axes = figure.subplots(3, 1, sharex=True)
        panels = (("training loss", "loss"), ("test accuracy", "accuracy"), (name, key))
        for ax, (heading, column) in zip(axes, panels, strict=True):
            ax.set_title(heading)
            ax.plot(steps, [row[column] for row in rows], color=COLOURS[0], label="parameters W")
            if column == "loss":
                ax.set_yscale("log")
            else:
                point = [row[f"point_{column}"] for row in rows]
                ax.plot(steps, point, color=COLOURS[1], ls="--", label="prox point Ŵ")
                ax.yaxis.set_major_formatter(PercentFormatter(1.0))
            for milestone in milestones:
                ax.axvline(milestone, color=GREY, lw=0.8, ls=":")
        axes[1].legend(loc="lower right")
        axes[2].set_ylim(-0.02, 1.02)
        axes[2].set_xlabel("step (dotted: next stage)" if milestones else "step")
        figure.savefig(path)


def draw_layers(
    strips: Strips, regularizer: str, milestones: Sequence[int], title: str, path: pathlib.Path
) -> None:
    """One heat-map a layer: which of its inputs (or singular values) live, epoch by epoch."""
    pieces = "singular values" if regularizer == "nuclear" else "inputs"
    colours = LinearSegmentedColormap.from_list("life", [_DEAD, _ALIVE])
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        layers = _in_order(strips)
        heights = [min(1.0, max(0.2, len(strip[0]) / 16)) for _, strip in layers]
        figure = figure_of(title, 7.5, 0.9 + 0.45 * len(layers) + 1.15 * sum(heights))
        axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False, height_ratios=heights)
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
                interpolation="nearest",
                extent=(0, epochs, len(life), 0),
            )
            ax.set_title(f"{name}:  {left} of {len(life)} {pieces} left")
            ax.set_yticks([0, len(life)])
            for milestone in milestones:
                ax.axvline(milestone, color=COLOURS[1], lw=0.9, ls=":")
        handles = [Patch(color=colour) for colour in (_ALIVE, _DEAD)]
        figure.legend(handles, ["alive in Ŵ", "exactly zero"], loc="outside lower center", ncols=2)
        axes[-1, 0].set_xlabel(f"epoch; {pieces} ordered by how long they live")
        figure.savefig(path)


def draw_comparison(
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
    with matplotlib.rc_context(STYLE):
        figure = figure_of(title, 12.5, 4.2)
        axes = figure.subplots(1, 3)
        for ax, (heading, column) in zip(axes, panels, strict=True):
            ax.set_title(heading)
            finals = []
            for i, (recipe, seeds) in enumerate(runs.items()):
                colour, width = COLOURS[i % len(COLOURS)], 1.3 + 0.5 * (len(runs) - 1 - i)
                values = np.array([[row[column] for row in rows] for rows in seeds])
                steps = [row["step"] for row in seeds[0]]
                # Earlier lines are wider, so that those which coincide can all be seen.
                ax.plot(steps, values.mean(axis=0), color=colour, lw=width, label=recipe)
                ax.fill_between(
                    steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0
                )
                finals.append(values[:, -max(1, values.shape[1] * 3 // 4) :])
            for milestone in milestones:
                ax.axvline(milestone, color=GREY, lw=0.8, ls=":")
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
            ax.set_xlabel("step")
            if column == "accuracy":  # the first quarter of a run would flatten the rest
                low, high = min(f.min() for f in finals), max(f.max() for f in finals)
                ax.set_ylim(low - 0.01, min(high + 0.01, 1.0))
            else:
                ax.set_ylim(-0.02, 1.02)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        figure.savefig(path)


def _in_order(strips: Strips) -> list[tuple[str, Sequence[np.ndarray]]]:
    """Convolutions before dense layers, as in the networks here."""
    return sorted(strips.items(), key=lambda item: (not item[0].startswith("Conv"), item[0]))
