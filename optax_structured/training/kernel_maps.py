"""The largest kernels of a network as they ended: a map of each, and its singular values."""

import io
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.colors import LogNorm

from optax_structured.training.style import COLOURS, DEAD, GREY, STYLE, figure_of
from optax_structured.trees import named_leaves, resolve

_SHOWN, _LARGEST_SIDE = 4, 400


def draw_kernels(params: Any, structure: Any) -> bytes | None:
    """PNG of the largest matrices; None if the parameters have none.

    Axes in front of the last two are unrolled into the rows; the rank of a `LowRank` is marked.
    """
    specs = resolve(structure, params)
    leaves = [
        (path, np.asarray(jax.device_get(leaf), np.float32), spec)
        for (path, leaf), spec in zip(named_leaves(params), specs, strict=True)
        if np.ndim(leaf) > 1 and min(np.shape(leaf)[-2:]) > 1
    ]
    largest = sorted(leaves, key=lambda entry: -entry[1].size)[:_SHOWN]
    if not largest:
        return None
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = figure_of("The largest kernels", 9.0, 0.8 + 2.3 * len(largest))
        rows = figure.subplots(len(largest), 2, squeeze=False, width_ratios=[3, 2])
        for (left, right), (path, leaf, spec) in zip(rows, largest, strict=True):
            matrix = leaf.reshape(-1, leaf.shape[-1])
            _map(left, path, np.abs(matrix))
            _spectrum(right, matrix, getattr(spec, "rank", None))
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _map(ax: Any, path: str, sizes: np.ndarray) -> None:
    zeros = (sizes == 0.0).mean()
    step = max(1, -(-max(sizes.shape) // _LARGEST_SIDE))
    shown = sizes[::step, ::step]
    ax.set_facecolor(DEAD)  # where nothing is drawn
    if sizes.any():
        top = sizes.max()
        norm = LogNorm(1e-4 * top, top, clip=True)
        cells = np.ma.masked_equal(shown, 0.0)
        ax.imshow(cells, aspect="auto", cmap="GnBu", norm=norm, interpolation="nearest")
    ax.set_title(f"{path}: {zeros:.0%} exactly zero (beige)")
    ax.set_ylabel(f"{sizes.shape[0]} rows")
    ax.set_xlabel(f"{sizes.shape[1]} columns")
    ax.set_xticks([])
    ax.set_yticks([])


def _spectrum(ax: Any, matrix: np.ndarray, rank: Any) -> None:
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values / values.max() if values.any() else values
    ax.semilogy(np.arange(1, len(share) + 1), np.maximum(share, 1e-8), ".", color=COLOURS[0], ms=4)
    ax.set_ylim(5e-9, 2)
    if isinstance(rank, int):
        ax.axvline(rank, color=COLOURS[1], lw=1, ls=":", label=f"rank of the projection, {rank}")
        ax.legend(loc="lower left")
    ax.set_title("singular values over the largest")
    ax.grid(color=GREY, alpha=0.25)
