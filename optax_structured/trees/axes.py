"""Matrix and group views of N-D leaves, told by axes; axes that are not named are batch axes."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structured.trees.checks import check_choice

AxisLike = int | tuple[int, ...]
Side = Literal["small", "large", "rows", "cols"]


def normalize_axes(axes: AxisLike, ndim: int, name: str) -> tuple[int, ...]:
    """Axes of a leaf as a tuple of ints of at least 0, all different, in the order given.

    Negative ones count from the end; `name` is what the errors call them.

    Raises:
      TypeError: `axes` is neither an int nor a tuple of ints.
      ValueError: an axis is out of range or given twice.

    >>> normalize_axes((-1, 0), 3, "rows")
    (2, 0)
    """
    try:
        given = [operator.index(axis) for axis in (axes if isinstance(axes, tuple) else (axes,))]
    except TypeError:
        raise TypeError(f"{name} must be an int or a tuple of ints, got {axes!r}") from None
    for axis in given:
        if not -ndim <= axis < ndim:
            valid = f"valid axes are {-ndim} to {ndim - 1}" if ndim else "a scalar has no axes"
            raise ValueError(
                f"{name}={axes!r}: axis {axis} is out of range for a leaf of ndim {ndim}; {valid}"
            )
    normal = tuple(axis % ndim for axis in given)
    if len(set(normal)) < len(normal):
        raise ValueError(f"{name}={axes!r} gives an axis of a leaf of ndim {ndim} twice")
    return normal


def group_view(
    shape: Sequence[int] | int, group_axis: AxisLike, batch_axis: AxisLike = ()
) -> tuple[int, ...]:
    """The axes inside a group: all that are neither group axes nor batch axes.

    Args:
      shape: shape of the leaf, or its number of dimensions.
      group_axis: the axes that number the groups.
      batch_axis: the axes that number independent copies (scan-stacked layers, heads).

    Returns:
      Sorted non-negative axes, to reduce over with `keepdims=True`; () where each entry is a group.

    Raises:
      ValueError: an axis is out of range, given twice, or both group and batch.

    >>> group_view((3, 3, 16, 32), group_axis=-1)
    (0, 1, 2)
    """
    ndim = shape if isinstance(shape, int) else len(shape)
    groups = normalize_axes(group_axis, ndim, "group_axis")
    batch = normalize_axes(batch_axis, ndim, "batch_axis")
    _check_disjoint(ndim, group_axis=(group_axis, groups), batch_axis=(batch_axis, batch))
    return tuple(axis for axis in range(ndim) if axis not in groups + batch)


@dataclasses.dataclass(frozen=True)
class Axes:
    r"""A leaf seen as a batch of matrices.

    .. math:: (\ldots) \to (*\text{batch}, m, n), \qquad m = \prod_{a \in \text{rows}} d_a,
        \quad n = \prod_{a \in \text{cols}} d_a

    Batch axes keep their order. The default equals the leaf itself: no operation is emitted.

    Args:
      rows: the axis, or the axes (flattened in the order given), that become the rows.
      cols: the same for the columns.
      side: which axis a low-rank factorisation compresses: `"small"` (default; the smaller one,
        columns when square), `"large"` (the other one, rows when square), `"rows"`, `"cols"`.

    Raises:
      TypeError, ValueError: axes that are not ints, none at all, or an unknown side.

    >>> Axes(rows=(0, 1), cols=-1).matrix_shape((3, 5, 7, 16))  # 7 is a batch axis
    (7, 15, 16)
    """

    rows: AxisLike = -2
    cols: AxisLike = -1
    side: Side = "small"

    def __post_init__(self) -> None:
        for name, axes in (("rows", self.rows), ("cols", self.cols)):
            if axes == ():
                raise ValueError(f"{name}=() names no axis; give an int or a tuple of ints")
            given = axes if isinstance(axes, tuple) else (axes,)
            if not all(hasattr(axis, "__index__") for axis in given):
                raise TypeError(f"{name} must be an int or a tuple of ints, got {axes!r}")
        check_choice("side", self.side, Side)

    @classmethod
    def from_dimension_numbers(cls, numbers: Any, side: Side = "small") -> "Axes":
        """The axes of a record such as `optax.contrib.MuonDimensionNumbers`.

        That is anything with `reduction_axis` (the rows) and `output_axis` (the columns).
        """
        if not (hasattr(numbers, "reduction_axis") and hasattr(numbers, "output_axis")):
            raise TypeError(
                "expected dimension numbers with reduction_axis and output_axis, "
                f"got {numbers!r}; or write Axes(rows, cols)"
            )
        return cls(numbers.reduction_axis, numbers.output_axis, side)

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless a leaf of this shape has these axes, without overlap."""
        self._permutation(shape)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape `(*batch, m, n)` of the view of a leaf of shape `shape`."""
        batch, rows, cols = self.split(shape)
        m, n = (math.prod(shape[axis] for axis in axes) for axes in (rows, cols))
        return (*(shape[axis] for axis in batch), m, n)

    def compressed_side(self, shape: Sequence[int]) -> Literal["rows", "cols"]:
        """Which axis of the matrix is compressed for a leaf of shape `shape`."""
        *_, m, n = self.matrix_shape(shape)
        if self.side in ("rows", "cols"):
            return self.side
        return "rows" if (m < n if self.side == "small" else m >= n) else "cols"

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """The view `(*batch, m, n)` of a leaf; reshapes only where several axes become one."""
        # jnp emits neither a transpose nor a reshape that would change nothing: a reshape of a
        # sharded axis fails under an explicit mesh.
        return jnp.transpose(x, self._permutation(x.shape)).reshape(self.matrix_shape(x.shape))

    def from_matrix(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The leaf of shape `shape` whose view is `y`: the inverse of `to_matrix`."""
        if y.shape != self.matrix_shape(shape):
            raise ValueError(
                f"a leaf of shape {tuple(shape)} has a matrix view of shape "
                f"{self.matrix_shape(shape)} under {self}, got {y.shape}"
            )
        order = self._permutation(shape)
        inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
        return jnp.transpose(y.reshape([shape[axis] for axis in order]), inverse)

    def split(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The batch axes, the row axes and the column axes of a leaf of shape `shape`."""
        ndim = len(shape)
        rows = normalize_axes(self.rows, ndim, "rows")
        cols = normalize_axes(self.cols, ndim, "cols")
        _check_disjoint(ndim, rows=(self.rows, rows), cols=(self.cols, cols))
        return tuple(axis for axis in range(ndim) if axis not in rows + cols), rows, cols

    def _permutation(self, shape: Sequence[int]) -> tuple[int, ...]:
        return sum(self.split(shape), ())


def _check_disjoint(ndim: int, **axes: tuple[AxisLike, tuple[int, ...]]) -> None:
    (first, (given, normal)), (second, (other_given, other)) = axes.items()
    if shared := set(normal) & set(other):
        raise ValueError(
            f"{first}={given!r} and {second}={other_given!r} both name axis {min(shared)} of a "
            f"leaf of ndim {ndim}"
        )
