"""What every kind of adapter has: a record that makes it, and the data that are trained."""

import abc
import math
from collections.abc import Sequence
from typing import Any

import jax

from optax_structured.trees import Axes


class Adapter(abc.ABC):
    """How one weight is adapted: a frozen record, by itself or as a value of `rules`."""

    @abc.abstractmethod
    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless a weight of this shape can be adapted so."""

    @abc.abstractmethod
    def init(self, key: jax.Array, weight: Any) -> "Node":
        """The data to be trained for one weight: float32, or float64 where the weight is."""


class Node(abc.ABC):
    """The trained data of one weight: a pytree of small arrays, with static scale and axes.

    Leading batch axes of the weight (scan-stacked layers) lead in every array, so that a scan over
    layers slices a node as it slices the weight.
    """

    @abc.abstractmethod
    def merged(self, weight: jax.Array, constant: Any) -> jax.Array:
        """The adapted weight, in float32 at least."""

    @property
    @abc.abstractmethod
    def made_for(self) -> tuple[int, ...]:
        """The shape of that weight; of a `MatrixNode`, as matrices."""

    def fits(self, weight: Any) -> bool:
        """Whether this node was made for a weight of this shape."""
        return weight.shape == self.made_for

    def constant(self, weight: jax.Array) -> Any:
        """What is read off the weight and not trained; None for nothing."""
        return None


class MatrixNode(Node):
    r"""A node for a weight that is seen as matrices (\*batch, inputs, outputs)."""

    axes: Axes  # of the weight

    def fits(self, weight: Any) -> bool:
        try:
            return self.axes.matrix_shape(weight.shape) == self.made_for
        except ValueError:  # it has no such axes
            return False


def is_node(x: Any) -> bool:
    """Whether a part of a tree is the adapter of one weight."""
    return isinstance(x, Node)


def from_the_end(axes: Axes, shape: Sequence[int]) -> Axes:
    """The same axes counted from the end: they hold for a slice of a stack, too.

    >>> from_the_end(Axes(rows=(1, 2), cols=3), (8, 3, 3, 16))
    Axes(rows=(-3, -2), cols=(-1,), side='small')
    """
    _, rows, cols = axes.split(shape)
    ndim = len(shape)
    return Axes(tuple(i - ndim for i in rows), tuple(i - ndim for i in cols), axes.side)


def matrix_of(axes: Axes, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """Batch, inputs and outputs of a weight."""
    *batch, inputs, outputs = axes.matrix_shape(shape)
    return tuple(batch), inputs, outputs


def check_matrix(axes: Axes, shape: Sequence[int], rank: Any = 1) -> None:
    """Raises ValueError unless a weight is a matrix under these axes that has this rank."""
    if math.prod(shape) == 0:
        raise ValueError(f"a weight of shape {tuple(shape)} has no entries to adapt")
    _, inputs, outputs = matrix_of(axes, shape)
    if rank > min(inputs, outputs):
        raise ValueError(
            f"rank {rank} exceeds the smaller side of a ({inputs}, {outputs}) matrix; use a rank "
            f"of at most {min(inputs, outputs)}, name other axes, or leave the weight out (None)"
        )


def check_axes(name: str, axes: Any) -> None:
    """Raises TypeError unless `axes` are `Axes`."""
    if not isinstance(axes, Axes):
        raise TypeError(f"{name}(axes=...) takes Axes(rows=inputs, cols=outputs), got {axes!r}")


def check_rank(name: str, rank: Any) -> None:
    """Raises unless `rank` is a whole number of at least 1."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name}(rank=...) takes a Python int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{name}(rank={rank}): the rank must be at least 1")
