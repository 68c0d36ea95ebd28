"""The look that all pictures of the two jobs share."""

from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, GREY = "#22313a", "#8a949a"
COLOURS = ("#12525e", "#d1603d", "#7a5195", "#4f8f3a", "#c9a227", "#5b6670")
DEAD, ALIVE = "#efe6d2", "#12525e"  # ends of a scale of shares
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def heat_map(ax: Any, values: Any, low: float, high: float, **place: Any) -> Any:
    """From dead at `low` to alive at `high`, a cell per value."""
    colours = LinearSegmentedColormap.from_list("life", [DEAD, ALIVE])
    style = {"aspect": "auto", "cmap": colours, "interpolation": "nearest", **place}
    return ax.imshow(values, vmin=low, vmax=high, **style)


def figure_of(title: str, width: float, height: float) -> Figure:
    """Without pyplot: a notebook keeps its own backend, and a server needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
