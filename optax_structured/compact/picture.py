"""The network as bars: what is alive of each leaf, over all of it."""

from typing import Any

from optax_structured.compact.report import Report

_ALL, _ALIVE = "#efe6d2", "#12525e"


def draw(report: Report) -> Any:
    """Draws a report as one bar per leaf, as long as its parameters, with what is alive in dark.

    Args:
      report: of `compact`.

    Returns:
      A matplotlib `Figure`, for `.savefig(path)` or a notebook. Vectors of one axis are left out
      where there are matrices. Needs matplotlib.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)).at[1:].set(0)}
      >>> small = oxs.compact.compact(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((5, 3)))
      >>> oxs.compact.draw(small.report).axes[0].get_title()
      'parameters 20 -> 5'
    """
    from matplotlib.figure import Figure

    layers = [x for x in report.layers if len(x.before) > 1] or list(report.layers)
    figure = Figure(figsize=(7.5, 0.9 + 0.32 * len(layers)), layout="constrained")
    axes = figure.subplots()
    for place, layer in enumerate(layers):
        before, after = layer.size
        axes.barh(place, before, color=_ALL, height=0.8)
        axes.barh(place, after, color=_ALIVE, height=0.8)
        share = f" {after / before:.0%}" if before else ""
        axes.text(before, place, share, va="center", fontsize=8)
    shapes = [f"{x.path}  {_shape(x.before)} → {_shape(x.after)}" for x in layers]
    axes.set_yticks(range(len(layers)), shapes, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("parameters: all, and those that are left")
    axes.set_title("parameters {:,} -> {:,}".format(*report.params), loc="center", fontsize=11)
    return figure


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
