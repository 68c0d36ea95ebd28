"""Which leaves are projected, and how."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from optax_structured.low_rank.spec import LowRank
from optax_structured.projectors.frames import Frame
from optax_structured.trees import Rules, named_leaves, resolve, state_keys
from optax_structured.trees.rules import check_some_use
from optax_structured.trees.tree_checks import check_real


@dataclasses.dataclass(frozen=True)
class Projected:
    """A leaf and the record that projects it, with all parts chosen."""

    name: str
    spec: Any
    frame: Frame
    share: float  # its position among all projected leaves, in [0, 1)


Leaves = dict[str, tuple[Any, Projected | None]]


def plan(table: Rules, tree: Any) -> Leaves:
    """Every leaf of a tree by its key in a state, and how it is projected."""
    named = named_leaves(tree)
    specs = resolve(table, tree)
    total = sum(spec is not None for spec in specs)
    check_some_use(table, tree, LowRank, "no leaf can be projected")
    rows: Leaves = {}
    seen = 0
    for key, (name, leaf), spec in zip(state_keys(tree), named, specs, strict=True):
        if spec is None:
            rows[key] = leaf, None
            continue
        check_real("a low-rank projection", {name: leaf})
        rows[key] = leaf, Projected(name, spec, spec.frame(jnp.shape(leaf)), seen / total)
        seen += 1
    return rows


def begun_by_field(
    leaves: Leaves, begun: Callable[..., Mapping[str, Any]], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What `begun` makes of each `(leaf, p)`, by the field of the state that holds it."""
    held: dict[str, dict[str, Any]] = {field: {} for field in fields}
    for key, (leaf, p) in leaves.items():
        for field, part in begun(leaf, p).items():
            held[field][key] = part
    return held
