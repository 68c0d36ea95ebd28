"""How a projector sees one leaf: a batch of matrices of which one axis is compressed."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structured.meshes import placement
from optax_structured.trees import Axes


@dataclasses.dataclass(frozen=True)
class Frame:
    r"""The oriented view of a leaf, all of it known while tracing.

    .. math:: (\ldots) \to (*\text{batch}, \text{size}, \text{length})

    The compressed axis comes first, so projectors never ask for the side, and the low-rank leaf
    :math:`R = P^\top G`, of shape (\*batch, rank, length), has its rank axis at -2 whatever the
    side: its rows are the singular directions, of one scale each.

    Leaves that are alike have equal frames, and share what is traced.

    Args:
      shape: of the leaf.
      axes: its matrix view.
      rank: what is kept of `size`; a tuple where each axis of a tensor is compressed by itself.
      both: whether the other matrix axis is compressed to the same rank.
    """

    shape: tuple[int, ...]
    axes: Axes
    rank: int | tuple[int, ...]
    both: bool = False

    @property
    def side(self) -> Literal["rows", "cols"]:
        """The matrix axis that is compressed."""
        return self.axes.compressed_side(self.shape)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return self.axes.matrix_shape(self.shape)[:-2]

    @property
    def size(self) -> int:
        """Length of the compressed axis."""
        *_, m, n = self.axes.matrix_shape(self.shape)
        return m if self.side == "rows" else n

    @property
    def length(self) -> int:
        """Length of the axis that stays."""
        *_, m, n = self.axes.matrix_shape(self.shape)
        return n if self.side == "rows" else m

    @property
    def count(self) -> int:
        """Number of matrices."""
        return math.prod(self.batch)

    @property
    def tensor_axes(self) -> tuple[int, ...]:
        """The axes of the leaf that are not batch axes, in their order there."""
        _, rows, cols = self.axes.split(self.shape)
        return tuple(sorted(rows + cols))

    @property
    def compressed(self) -> tuple[tuple[int, int], ...]:
        """`(length, rank)` of each axis that is compressed: the shapes of the factors."""
        if isinstance(self.rank, tuple):
            sizes = (self.shape[axis] for axis in self.tensor_axes)
            return tuple(zip(sizes, self.rank, strict=True))
        sides = (self.size, self.length) if self.both else (self.size,)
        return tuple((n, self.rank) for n in sides)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the low-rank leaf."""
        kept = tuple(rank for _, rank in self.compressed)
        one_sided = isinstance(self.rank, int) and not self.both
        return (*self.batch, *kept, self.length) if one_sided else (*self.batch, *kept)

    @property
    def numbers(self) -> int:
        """What bases and two moments take; two moments of the leaf itself take twice its entries.

        A basis that is computed from a few numbers counts like a stored one, so that a table of
        rules says the same for every recipe.
        """
        return self.count * sum(n * r for n, r in self.compressed) + 2 * math.prod(self.low_shape)

    @property
    def one(self) -> "Frame":
        """The view of one matrix of the batch."""
        return Frame(
            self.axes.matrix_shape(self.shape)[-2:], Axes(side=self.side), self.rank, self.both
        )

    def orient(self, leaf: jax.Array) -> jax.Array:
        """(\\*batch, size, length) of a leaf; a transpose that XLA folds into its readers."""
        return self.turn(self.axes.to_matrix(leaf))

    def restore(self, oriented: Any) -> jax.Array:
        """The leaf of an oriented view."""
        return self.axes.from_matrix(self.turn(oriented), self.shape)

    def turn(self, x: jax.Array) -> jax.Array:
        """From the oriented view to the matrix in its own orientation, and back."""
        return x if self.side == "rows" else jnp.swapaxes(x, -1, -2)


def matrix_where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new one for each matrix that is chosen; what all share is new where any is."""
    if new.ndim < chosen.ndim:
        return jnp.where(jnp.any(chosen), new, old)
    # Not `jnp.where`: a function of its own, which would be compiled into each of its callers.
    mask = placement.repeated(chosen, new)
    return jax.lax.select(mask, new, placement.like(old, new))
