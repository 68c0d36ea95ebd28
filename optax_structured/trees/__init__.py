"""Names, rules and views of the leaves of a parameter tree."""

from optax_structured.trees.axes import Axes, AxisLike, Side, group_view, normalize_axes
from optax_structured.trees.paths import map_named, named_leaves, path_name
from optax_structured.trees.rules import Assignment, Rules, as_rules, resolve, rules

__all__ = [
    "Assignment",
    "Axes",
    "AxisLike",
    "Rules",
    "Side",
    "as_rules",
    "group_view",
    "map_named",
    "named_leaves",
    "normalize_axes",
    "path_name",
    "resolve",
    "rules",
]
