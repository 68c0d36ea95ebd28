"""The picture of a fine-tuned network: what each adapter has learned."""

import pathlib
from typing import Any

import matplotlib
import numpy as np

from optax_structured.training.style import COLOURS, STYLE, figure_of
from optax_structured.trees import named_leaves

SPECTRA = "spectra.png"


def draw_spectra(update: Any, title: str, folder: pathlib.Path) -> None:
    """Singular values of what was added to each kernel."""
    with matplotlib.rc_context(STYLE):
        figure = figure_of(title, 7.5, 3.5)
        ax = figure.subplots()
        for i, (path, leaf) in enumerate(x for x in named_leaves(update) if np.ndim(x[1]) > 1):
            values = np.linalg.svd(np.reshape(leaf, (-1, leaf.shape[-1])), compute_uv=False)
            shown = np.maximum(values, 1e-6 * max(values[0], 1e-6))
            style: Any = {"color": COLOURS[i % len(COLOURS)], "label": path, "marker": "."}
            ax.plot(np.arange(1, len(values) + 1), shown, **style)
        ax.set_yscale("log")
        ax.set_xlabel("number of the singular value")
        ax.set_title("singular values of the update")
        ax.legend()
        figure.savefig(folder / SPECTRA)
