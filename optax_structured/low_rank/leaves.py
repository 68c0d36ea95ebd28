"""Which leaves are projected, and how."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from optax_structured.low_rank.spec import LowRank
from optax_structured.meshes.placement import whole_matrices
from optax_structured.projectors.base import transpose
from optax_structured.projectors.frames import Frame
from optax_structured.trees import Rules, named_leaves, resolve, state_keys
from optax_structured.trees.rules import check_some_use
from optax_structured.trees.tree_checks import check_real


@dataclasses.dataclass(frozen=True)
class Projected:
    """A leaf and the record that projects it, with all parts chosen."""

    spec: Any
    frame: Frame
    share: float  # its position among all projected leaves, in [0, 1)

    def encoded(self, basis: Any) -> Any:
        """A basis as stored: itself, or in codes, oriented like the matrix."""
        codec, frame = self.spec.codec, self.frame
        if codec is None:
            return basis
        beside = whole_matrices(frame.turn(transpose(basis)))
        return codec.encode(beside, batch=len(frame.batch))

    def decoded(self, stored: Any) -> Any:
        """The basis of what is stored."""
        codec, frame = self.spec.codec, self.frame
        if codec is None:
            return stored
        sides = (frame.size, frame.rank) if frame.side == "rows" else (frame.rank, frame.size)
        beside = codec.decode(stored, (*frame.batch, *sides), batch=len(frame.batch))
        return transpose(frame.turn(beside))


def plan(table: Rules, tree: Any) -> dict[str, tuple[Any, Projected | None]]:
    """Every leaf of a tree by its key in a state, and how it is projected."""
    named = named_leaves(tree)
    specs = resolve(table, tree)
    total = sum(spec is not None for spec in specs)
    check_some_use(table, tree, LowRank, "no leaf can be projected")
    rows: dict[str, tuple[Any, Projected | None]] = {}
    seen = 0
    for key, (name, leaf), spec in zip(state_keys(tree), named, specs, strict=True):
        if spec is None:
            rows[key] = leaf, None
            continue
        check_real("a low-rank projection", {name: leaf})
        rows[key] = leaf, Projected(spec, spec.frame(name, jnp.shape(leaf)), seen / total)
        seen += 1
    return rows
