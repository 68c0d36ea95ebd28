"""The life of every layer's inputs, epoch by epoch."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.patches import Patch

from optax_structured.diagnostics import LayerRow
from optax_structured.regularizers import NuclearNorm
from optax_structured.training.style import ALIVE, COLOURS, DEAD, STYLE, figure_of, heat_map

LAYERS = "layers.png"


def draw_layers(
    strips: Mapping[str, Sequence[np.ndarray]],
    rows: Sequence[LayerRow],
    milestones: Sequence[int],
    title: str,
    folder: pathlib.Path,
) -> None:
    """One heat map per kernel: the share that is left of each of its inputs or singular values.

    Args:
      strips: by path, one array per epoch.
      rows: the leaves as the table of layers shows them, for the counts.
      milestones: epochs.
      title: of the picture, `layers.png`.
      folder: of the run.
    """
    by_path = {row.path: row for row in rows}
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        # Convolutions before dense layers, as in the networks here.
        layers = sorted(strips.items(), key=lambda x: (not x[0].startswith("Conv"), x[0]))
        heights = [min(1.0, max(0.2, len(strip[0]) / 16)) for _, strip in layers]
        figure = figure_of(title, 7.5, 0.9 + 0.45 * len(layers) + 1.15 * sum(heights))
        axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False, height_ratios=heights)
        for ax, (path, strip) in zip(axes[:, 0], layers, strict=True):
            life = np.stack(strip, axis=1)  # (inputs or singular values, epochs)
            longest_first = np.argsort(-life.sum(axis=1), kind="stable")
            heat_map(ax, life[longest_first], 0, 1, extent=(0, life.shape[1], len(life), 0))
            row = by_path[path]
            drawn, counted = _words(row)
            ax.set_title(f"{path}:  {int(row.alive)} of {row.pieces} {counted} left")
            ax.set_ylabel(drawn if len(life) > 4 else "")
            ax.set_yticks([0, len(life)])
            for milestone in milestones:
                ax.axvline(milestone, color=COLOURS[1], lw=0.9, ls=":")
        handles = [Patch(color=colour) for colour in (ALIVE, DEAD)]
        labels = ["alive in Ŵ (shades: the share that is)", "exactly zero"]
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        axes[-1, 0].set_xlabel("epoch; those that live longest on top (dotted: next stage)")
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels()
        figure.savefig(folder / LAYERS)


def _words(row: LayerRow) -> tuple[str, str]:
    """What a line of a picture is, and what the table of the layers counts."""
    if isinstance(row.regularizer, NuclearNorm):
        return "singular\nvalues", "singular values"
    grouped = row.regularizer is not None and row.piece_size > 1
    return "inputs", "inputs" if grouped else "entries"
