"""The pictures that all tasks have: a run, and several recipes side by side."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from optax_structured.training.folder import Row
from optax_structured.training.history import History
from optax_structured.training.style import COLOURS, GREY, STYLE, figure_of
from optax_structured.training.task import Panel, Task

TRAINING, COMPARISON = "training.png", "comparison.png"
_SMOOTHED = 100  # points of the drawn training loss
_LINES = ("-", "--", ":")


def draw_training(task: Task, history: History, folder: pathlib.Path) -> None:
    """Training loss, and the panels of the task, over the steps."""
    with matplotlib.rc_context(STYLE):
        figure = figure_of(task.title, 7.5, 2.5 * (1 + len(task.panels)))
        first, *others = figure.subplots(1 + len(task.panels), 1, sharex=True)
        losses = history.losses
        steps, pieces = np.arange(1, len(losses) + 1), min(_SMOOTHED, len(losses))
        first.plot(steps, losses, color=GREY, lw=0.6, alpha=0.6)
        means = [chunk.mean() for chunk in np.array_split(losses, pieces)]
        first.plot([chunk[-1] for chunk in np.array_split(steps, pieces)], means, color=COLOURS[0])
        _prepare(first, Panel("training loss, nats", {}, log=True), task)
        for ax, panel in zip(others, task.panels, strict=True):
            for i, (column, label) in enumerate(panel.lines.items()):
                values = [row[column] for row in history.rows]
                style = {"color": COLOURS[i], "ls": _LINES[i], "label": label, "marker": "."}
                ax.plot([row["step"] for row in history.rows], values, **style)
            _prepare(ax, panel, task)
            if len(panel.lines) > 1:
                ax.legend()
        others[-1].set_xlabel("step (dotted: next stage)" if task.milestones else "step")
        figure.savefig(folder / TRAINING)


def draw_comparison(
    task: Task, runs: Mapping[str, Sequence[Sequence[Row]]], title: str, folder: pathlib.Path
) -> None:
    """Every line of every panel of several recipes: mean over seeds, band from least to most."""
    panels = [
        panel._replace(title=f"{panel.title}, {label}", lines={column: label})
        for panel in task.panels
        for column, label in panel.lines.items()
    ]
    columns = min(2, len(panels))
    with matplotlib.rc_context(STYLE):
        height = 0.8 + 3.4 * -(-len(panels) // columns)
        figure = figure_of(title, 7.5 if columns == 1 else 11.0, height)
        axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels, strict=True):
            (column,) = panel.lines
            for i, (recipe, seeds) in enumerate(runs.items()):
                values = np.array([[row[column] for row in rows] for rows in seeds])
                steps = [row["step"] for row in seeds[0]]
                # Earlier lines are wider, so that those which coincide can all be seen.
                style = {
                    "color": COLOURS[i % len(COLOURS)],
                    "ls": _LINES[i // len(COLOURS) % 3],
                    "lw": 1.3 + 0.4 * (len(runs) - 1 - i),
                }
                ax.plot(steps, values.mean(axis=0), label=recipe, **style)
                band = values.min(axis=0), values.max(axis=0)
                ax.fill_between(steps, *band, color=style["color"], alpha=0.15, lw=0)
            _prepare(ax, panel, task)
            ax.set_xlabel("step")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(folder / COMPARISON)


def _prepare(ax: Axes, panel: Panel, task: Task) -> None:
    """Title, scale, plain numbers and the ends of stages."""
    ax.set_title(panel.title)
    for milestone in task.milestones:
        ax.axvline(milestone, color=GREY, lw=0.8, ls=":")
    unit = FuncFormatter(
        (lambda x, _: f"{100 * x:g}%") if panel.percent else (lambda x, _: f"{x:g}")
    )
    if panel.log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif panel.percent:
        ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(unit)
