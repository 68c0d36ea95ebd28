"""What a leaf gets from a table: a value, or nothing because it does not fit."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_structured.trees.tables import aligned, kinds


class Assignment(NamedTuple):
    """What a table gives to one leaf."""

    path: str  # "/"-joined name of the leaf
    leaf: Any  # the leaf itself
    rule: str | None  # the pattern that matched first; None where the default applies
    value: Any  # the value of that rule; None: the leaf stays plain
    reason: str = ""  # why the leaf cannot take the default, where it cannot

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf."""
        return np.shape(self.leaf)


def fitted(item: Assignment) -> Assignment:
    """The same with the value as it applies to the shape of the leaf.

    Raises:
      ValueError: a leaf that cannot take the value of a pattern. One that cannot take the default
        stays plain, with a value of None and a reason.
    """
    path, leaf, rule, value, _ = item
    try:
        if hasattr(value, "check"):
            value.check(item.shape)
    except ValueError as error:
        if rule is None:
            return item._replace(value=None, reason=str(error))
        raise ValueError(
            f"rules: pattern {rule!r} gives {value!r} to {path!r} of shape {item.shape}, which "
            f"cannot take it: {error}"
        ) from error
    return item._replace(value=value.fitted(item.shape)) if hasattr(value, "fitted") else item


def table(leaves: Sequence[Assignment], patterns: Sequence[str]) -> str:
    """The text of `Rules.table`."""
    rows = [("path", "shape", "dtype", "rule", "value")]
    rows += [(name, *_cells(alike[0])) for name, alike in kinds(leaves, _cells)]
    lines = [aligned(rows)]
    if leaves:
        plain = [leaf for leaf in leaves if leaf.value is None]
        total, left = (sum(math.prod(leaf.shape) for leaf in some) for some in (leaves, plain))
        summary = f"{len(leaves)} leaves of {total:,} entries"
        lines.append(f"{summary}; {len(plain)} of {left:,} entries stay plain")
        used = {leaf.rule for leaf in leaves}
        lines += [
            f"no leaf goes by the pattern {pattern!r}: earlier ones match first, or it is masked"
            for pattern in patterns
            if pattern not in used
        ]
    return "\n".join(lines)


def _cells(leaf: Assignment) -> tuple[str, str, str, str]:
    dtype = str(getattr(leaf.leaf, "dtype", type(leaf.leaf).__name__))
    rule = "default" if leaf.rule is None else leaf.rule
    value = leaf.value.shown(leaf.shape) if hasattr(leaf.value, "shown") else repr(leaf.value)
    if leaf.reason:
        value += f" (cannot take the default: {leaf.reason.split('; ')[0]})"
    return str(leaf.shape), dtype, rule, value
