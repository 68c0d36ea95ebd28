"""How the wrapper sees one leaf: a batch of matrices of which one axis is compressed."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structured.meshes import placement
from optax_structured.trees import Axes, state_key


@dataclasses.dataclass(frozen=True)
class Frame:
    r"""The oriented view of a leaf, all of it known while tracing.

    .. math:: (\ldots) \to (*\text{batch}, \text{size}, \text{length})

    The compressed axis comes first, so projectors never ask for the side, and the low-rank leaf
    :math:`R = P^\top G`, of shape (\*batch, rank, length), has its rank axis at -2 whatever the
    side: its rows are the singular directions, of one scale each.

    Args:
      name: path of the leaf.
      shape: of the leaf.
      axes: its matrix view.
      rank: what is kept of `size`; a tuple, one per matrix axis, for projectors that compress all.
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes
    rank: int | tuple[int, ...]

    @property
    def key(self) -> str:
        """Of the leaf in a state."""
        return state_key(self.name)

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
