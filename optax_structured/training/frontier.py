"""Which one, by a picture: how recipes end, against what they cost, and who is not beaten."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from optax_structured.training.comparison import Comparison
from optax_structured.training.style import COLOURS, INK, STYLE, figure_of
from optax_structured.training.task import Cost

PICTURE = "frontier.png"
_FINE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)  # of a decade
_MARKERS = "osD"
_CORNERS, _ROOM = ((9, 6), (9, -7), (-9, 6), (-9, -7), (0, 11), (0, -12)), 8.0  # points
_COLOURS = {"plain": COLOURS[1], "low_rank": COLOURS[0], "proximal": COLOURS[2], "": COLOURS[5]}
_NAMES = {"plain": "full rank", "low_rank": "low rank", "proximal": "exact structure", "": ""}


def draw(found: Comparison, folder: pathlib.Path) -> None:
    """The score of each recipe against each cost, with errors; a dashed line joins the frontier.

    Recipes are numbered from the best score on, and listed beside the picture. Those that only
    differ behind an @, as `ramda@0.001` and `ramda@0.003`, are one curve.

    Args:
      found: the comparison; what diverged is left out.
      folder: where `frontier.png` goes.
    """
    score = found.judged[0]
    ranked = sorted(found.whole, key=lambda name: found.entries[name].of(score.name)[0])
    curves: dict[str, list[str]] = {}
    for name in found.whole:
        curves.setdefault(name.partition("@")[0], []).append(name)
    with matplotlib.rc_context(STYLE):
        count = len(found.fair_costs)
        figure = figure_of(found.title, 4.6 * count + 2.6, max(4.6, 1.0 + 0.22 * len(ranked)))
        *axes, beside = figure.subplots(1, count + 1, width_ratios=[1] * count + [0.5])
        for ax, cost in zip(axes, found.fair_costs, strict=True):
            front = [found.entries[name] for name in found.frontier(cost)]
            points = [(e.of(cost.name)[0], e.of(score.name)[0]) for e in front]
            ax.plot(*zip(*points, strict=True), color=INK, lw=0.9, ls="--", zorder=1)
            if len(curves) < len(ranked):
                _draw_curves(ax, found, cost, curves)
            else:
                _draw_points(ax, found, cost, ranked)
            _prepare(ax, found, cost)
        if len(curves) == len(ranked):
            figure.draw_without_rendering()  # places the axes
            for ax, cost in zip(axes, found.fair_costs, strict=True):
                _number_points(ax, found, cost, ranked)
        beside.axis("off")
        if len(curves) < len(ranked):
            title = "filled: on the frontier"
            beside.legend(*axes[0].get_legend_handles_labels(), loc="upper left", title=title)
        else:
            _list(beside, found, ranked)
        figure.savefig(folder / PICTURE)


def _bars(found: Comparison, cost: Cost, name: str) -> dict[str, Any]:
    """The arguments of one point of `Axes.errorbar`."""
    entry = found.entries[name]
    (x, *across), (y, *along) = entry.of(cost.name), entry.of(found.judged[0].name)
    return {"x": [x], "y": [y], "xerr": [[e] for e in across], "yerr": [[e] for e in along]}


def _draw_points(ax: Axes, found: Comparison, cost: Cost, ranked: Sequence[str]) -> None:
    front = found.frontier(cost)
    for name in ranked:
        colour, bars = _COLOURS[found.entries[name].family], _bars(found, cost, name)
        marker = "s" if ":" in name or "8-bit" in found.entries[name].settings else "o"
        face = colour if name in front else "white"
        ax.errorbar(**bars, fmt=marker, ms=6, color=colour, mfc=face, elinewidth=0.9)


def _number_points(ax: Axes, found: Comparison, cost: Cost, ranked: Sequence[str]) -> None:
    """Each at the first corner of its point that is free; the axes have their final limits."""
    points = [
        (found.entries[name].of(cost.name)[0], found.entries[name].of(found.judged[0].name)[0])
        for name in ranked
    ]
    centres = ax.transData.transform(points) / ax.figure.dpi * 72
    taken = list(centres)
    for number, (name, point, centre) in enumerate(zip(ranked, points, centres, strict=True), 1):
        free = [_room(centre + corner, taken) for corner in _CORNERS]
        chosen = next((i for i, room in enumerate(free) if room > _ROOM), int(np.argmax(free)))
        taken.append(centre + _CORNERS[chosen])
        colour = _COLOURS[found.entries[name].family]
        given: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "center",
            "va": "center",
            "fontsize": 8,
        }
        ax.annotate(str(number), point, _CORNERS[chosen], color=colour, **given)


def _room(place: Any, taken: Sequence[Any]) -> float:
    return min(float(np.hypot(*(place - other))) for other in taken)


def _draw_curves(ax: Axes, found: Comparison, cost: Cost, curves: dict[str, list[str]]) -> None:
    front = found.frontier(cost)
    for i, (curve, names) in enumerate(curves.items()):
        colour, fmt = COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS) % len(_MARKERS)]
        label: str | None = curve
        for name in names:
            face = colour if name in front else "white"
            bars = _bars(found, cost, name)
            ax.errorbar(**bars, fmt=fmt, ms=5, color=colour, mfc=face, elinewidth=0.9, label=label)
            label = None
        if cost.name == "step_ms":  # hardly depends on what the points differ in
            continue
        points = [found.entries[name] for name in names]
        columns = [[e.of(c)[0] for e in points] for c in (cost.name, found.judged[0].name)]
        ax.plot(*columns, color=colour, lw=1.0, alpha=0.6)


def _list(ax: Axes, found: Comparison, ranked: Sequence[str]) -> None:
    """Number, name and score of each, and what the markers mean."""
    score = found.judged[0]
    lines = [
        (f"{number:>2} {name:<15} {score.ends([found.entries[name].of(score.name)[0]])}", name)
        for number, name in enumerate(ranked, 1)
    ]
    step = 1 / max(24, len(lines) + 6)
    for i, (line, name) in enumerate(lines):
        colour = _COLOURS[found.entries[name].family]
        ax.text(0, 1 - i * step, line, family="monospace", fontsize=8, va="top", color=colour)
    families = dict.fromkeys(found.entries[name].family for name in ranked)
    notes = [(_NAMES[family], _COLOURS[family]) for family in families]
    notes += [("square: state in codes", INK), ("filled: on the frontier", INK)]
    for i, (note, colour) in enumerate(notes, len(lines) + 1):
        ax.text(0, 1 - i * step, note, fontsize=8, va="top", color=colour)


def _prepare(ax: Axes, found: Comparison, cost: Cost) -> None:
    score = found.judged[0]
    ax.set_ylabel(score.heading)
    ax.set_xlabel(cost.heading)
    if not cost.percent:
        ax.set_xscale("log")
    ax.set_yscale("log")
    for axis, percent in ((ax.xaxis, cost.percent), (ax.yaxis, score.percent)):
        axis.set_major_formatter(FuncFormatter(_percent if percent else _plain))
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 4 * low else _FINE))
            axis.set_minor_formatter(NullFormatter())


def _percent(x: float, _: int) -> str:
    return f"{100 * x:g}%"


def _plain(x: float, _: int) -> str:
    return next((f"{x / n:g}{s}" for n, s in ((1e6, "M"), (1e3, "k")) if x >= n), f"{x:g}")
