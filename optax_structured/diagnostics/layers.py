"""What is left of each leaf: the structure that is nonzero, and a row of a table."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.diagnostics.penalised import dual_norm
from optax_structured.regularizers import Regularizer
from optax_structured.regularizers.base import piece_size
from optax_structured.trees import named_leaves, resolve


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["alive", "strength_max"],
    meta_fields=["path", "shape", "regularizer", "pieces", "piece_size"],
)
@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One leaf of a network, as `layer_rows` sees it; a pytree whose names are static."""

    path: str
    shape: tuple[int, ...]
    regularizer: Regularizer | None  # None: a plain leaf, whose pieces are its entries
    pieces: int  # entries, groups or singular values
    piece_size: int  # entries that one piece stands for
    alive: jax.Array  # () int32: how many pieces are nonzero
    strength_max: jax.Array | None  # (): dual norm of the gradient of this leaf


def supports(w: Any, structure: Any) -> dict[str, jax.Array]:
    """Which pieces of structure are nonzero, by the path of each regularised leaf.

    Args:
      w: parameters, or the prox point.
      structure: as in `structured_sparsity`.

    Returns:
      From path to an array of bool, one per entry, group or singular value.

    >>> import optax_structured as oxs
    >>> supports({"kernel": jnp.array([1.0, 0.0])}, oxs.L1())
    {'kernel': Array([ True, False], dtype=bool)}
    """
    named = zip(named_leaves(w), resolve(structure, w), strict=True)
    return {path: spec.support(leaf) for (path, leaf), spec in named if spec is not None}


def layer_rows(w: Any, structure: Any, gradient: Any = None) -> list[LayerRow]:
    """One row per leaf: pieces of structure it has, how many are left, how hard it is held.

    Args:
      w, structure: as in `supports`.
      gradient: of the loss; with it, rows of leaves whose penalty has one get `strength_max`, the
        dual norm of the gradient. At a stationary point it is at most the strength where a leaf is
        zero, and equal to it where something is left.

    Returns:
      Rows in the order of the leaves, plain ones too.

    >>> import optax_structured as oxs
    >>> (row,) = layer_rows({"kernel": jnp.array([1.0, 0.0])}, oxs.L1())
    >>> print(row.path, row.pieces, row.alive)
    kernel 2 1
    """
    named = named_leaves(w)
    slopes = [None] * len(named) if gradient is None else jax.tree.leaves(gradient)
    rows = []
    for (path, leaf), spec, slope in zip(named, resolve(structure, w), slopes, strict=True):
        support = leaf != 0.0 if spec is None else spec.support(leaf)
        size = 1 if spec is None else piece_size(spec, leaf.shape)
        held = None if spec is None or slope is None else dual_norm(spec, slope)
        alive = jnp.count_nonzero(support)
        rows.append(LayerRow(path, leaf.shape, spec, support.size, size, alive, held))
    return rows
