"""Names, rules and views of the leaves of a parameter tree."""

from optax_structured.trees.assignment import Assignment
from optax_structured.trees.axes import Axes, AxisLike, Side, group_view, normalize_axes
from optax_structured.trees.paths import (
    map_named,
    name_of_key,
    named_leaves,
    path_name,
    state_key,
    state_keys,
)
from optax_structured.trees.rules import Rules, as_rules, resolve, rules

__all__ = [
    "Assignment",
    "Axes",
    "AxisLike",
    "Rules",
    "Side",
    "as_rules",
    "group_view",
    "map_named",
    "name_of_key",
    "named_leaves",
    "normalize_axes",
    "path_name",
    "resolve",
    "rules",
    "state_key",
    "state_keys",
]
