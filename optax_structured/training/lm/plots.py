"""Pictures of a language-model run: loss and perplexity, the leaves over training, recipes."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FormatStrFormatter

from optax_structured.training.folder import Row
from optax_structured.training.lm.config import Config
from optax_structured.training.style import COLOURS, GREY, STYLE, figure_of

TRAINING, LEAVES = "training.png", "leaves.png"
_SMOOTHED = 100  # points of the drawn training loss


def draw_training(
    rows: Sequence[Row], losses: np.ndarray, config: Config, title: str, folder: pathlib.Path
) -> None:
    """Training loss and held-out perplexity over the bytes seen."""
    with matplotlib.rc_context(STYLE):
        figure = figure_of(title, 7.5, 5.5)
        loss, perplexity = figure.subplots(2, 1, sharex=True)
        every = max(1, len(losses) // _SMOOTHED)
        tokens = config.tokens_a_step * np.arange(1, len(losses) + 1)
        loss.plot(tokens, losses, color=GREY, lw=0.6, alpha=0.6)
        means = [chunk.mean() for chunk in np.array_split(losses, -(-len(losses) // every))]
        ends = [chunk[-1] for chunk in np.array_split(tokens, -(-len(losses) // every))]
        loss.plot(ends, means, color=COLOURS[0])
        loss.set_title("training loss, nats a byte")
        held_out = [row["perplexity"] for row in rows]
        perplexity.plot([row["tokens"] for row in rows], held_out, color=COLOURS[1], marker="o")
        perplexity.set_title("held-out perplexity a byte")
        _logarithmic(perplexity)
        figure.savefig(folder / TRAINING)


def draw_leaves(leaves: Sequence[Row], title: str, folder: pathlib.Path) -> None:
    """One panel a diagnostic, one line a leaf; nothing for a recipe that keeps full rank."""
    if not leaves:
        return
    names = [name for name in leaves[0] if name not in ("step", "path")]
    paths = list(dict.fromkeys(row["path"] for row in leaves))
    with matplotlib.rc_context(STYLE):
        figure = figure_of(title, 7.5, 1.0 + 2.3 * len(names))
        axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for ax, name in zip(axes, names, strict=True):
            ax.set_title(name.replace("_", " "))
            for i, path in enumerate(paths):
                own = [row for row in leaves if row["path"] == path]
                ax.plot(
                    [row["step"] for row in own],
                    [row[name] for row in own],
                    color=COLOURS[i % len(COLOURS)],
                    ls=("-", "--", ":")[i // len(COLOURS) % 3],
                    lw=1.2,
                    label=path,
                )
        axes[-1].set_xlabel("step")
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
        figure.savefig(folder / LEAVES)


def draw_comparison(
    runs: Mapping[str, Sequence[Sequence[Row]]], title: str, path: pathlib.Path
) -> None:
    """Held-out perplexity over the bytes seen: mean over seeds, band from least to most."""
    with matplotlib.rc_context(STYLE):
        figure = figure_of(title, 7.5, 5.0)
        ax = figure.subplots()
        ax.set_title("held-out perplexity a byte")
        for i, (recipe, seeds) in enumerate(runs.items()):
            colour = COLOURS[i % len(COLOURS)]
            style = ("-", "--", ":")[i // len(COLOURS) % 3]
            values = np.array([[row["perplexity"] for row in rows] for rows in seeds])
            values = values[:, values.shape[1] // 4 :]  # the beginning would flatten the rest
            tokens = [row["tokens"] for row in seeds[0]][-values.shape[1] :]
            ax.plot(tokens, values.mean(axis=0), color=colour, ls=style, label=recipe)
            ax.fill_between(
                tokens, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0
            )
        _logarithmic(ax)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(path)


def _logarithmic(ax: Axes) -> None:
    """Perplexity on a logarithmic axis with plain numbers, over the bytes seen."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    ax.set_xlabel("bytes seen")
