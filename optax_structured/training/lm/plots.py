"""What each low-rank leaf does over a run: one heat map per diagnostic."""

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np

from optax_structured.training.folder import Row
from optax_structured.training.style import STYLE, figure_of, heat_map

PICTURE = "leaves.png"
_LEGIBLE = 48  # leaves that still have a name each
# What each shows, and whether it is a share.
_HINTS = {
    "captured_energy": ("share of the gradient in the\nsubspace: high is good", True),
    "effective_rank": ("directions in use: far below\nthe rank, it could be less", False),
    "subspace_overlap": ("with a basis refit now:\nlow, refit more often", True),
    "limiter_activity": ("1 where the step was cut:\nrare after the start", True),
}


def draw_leaves(leaves: Sequence[Row], rank: int, title: str, folder: pathlib.Path) -> None:
    """A row per leaf, a column per evaluation, from rows of `probes.rows`.

    `rank` is the largest possible effective rank.
    """
    names = [name for name in leaves[0] if name in _HINTS]
    paths = list(dict.fromkeys(row["path"] for row in leaves))
    steps = list(dict.fromkeys(row["step"] for row in leaves))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        height = 2.0 + 0.24 * min(len(paths), _LEGIBLE)
        figure = figure_of(title, 2.4 + 2.6 * len(names), height)
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for ax, name in zip(axes, names, strict=True):
            hint, share = _HINTS[name]
            values = np.array([row[name] for row in leaves]).reshape(len(steps), len(paths)).T
            shown = heat_map(ax, values, *((0, 1) if share else (1, rank)))
            ax.set_title(name.replace("_", " ") + ("" if share else f" (of {rank})"))
            figure.colorbar(shown, ax=ax, location="bottom", shrink=0.9, label=hint)
            ticks = range(0, len(steps), max(1, len(steps) // 4))
            ax.set_xticks(list(ticks), [str(steps[i]) for i in ticks])
            ax.set_xlabel("step")
        if len(paths) <= _LEGIBLE:
            axes[0].set_yticks(range(len(paths)), paths, fontsize=8)
        else:
            axes[0].set_ylabel(f"{len(paths)} leaves, in the order of leaves.csv")
        figure.savefig(folder / PICTURE)
