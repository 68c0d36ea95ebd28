"""Total variation along an axis, minimised exactly in any diagonal metric."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, promote
from optax_structured.trees.axes import normalize_axes
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class TotalVariation(Regularizer):
    r"""The sum of all jumps along an axis: weights become constant in pieces.

    .. math:: \psi(w) = \sum_i |w_{i+1} - w_i|

    along `axis`; each line of the other axes is a problem of its own. The minimiser is found by
    dynamic programming over the derivatives of the cost of the first entries, which are piecewise
    linear, in time proportional to the length of the axis (one entry after the other: for axes
    up to some thousands). The support is one bool per pair of neighbours: where there is a jump.

    Args:
      axis: the axis of neighbours; negative ones count from the end.

    Raises:
      TypeError: an axis that is not an int.
      ValueError: from `check`, a leaf without this axis or with fewer than two entries along it.

    References:
      Johnson, A dynamic programming algorithm for the fused lasso and L0-segmentation, JCGS, 2013.

    >>> import jax.numpy as jnp
    >>> print(TotalVariation().prox(jnp.array([1.0, 1.2, 5.0, 4.6]), metric=1.0, strength=0.5))
    [1.35 1.35 4.55 4.55]
    """

    axis: int = -1

    def __post_init__(self) -> None:
        try:
            operator.index(self.axis)
        except TypeError:
            raise TypeError(f"axis must be an int, got {self.axis!r}") from None

    def value(self, w: ArrayLike) -> jax.Array:
        w = at_least_float32(w)
        return jnp.sum(jnp.abs(jnp.diff(w, axis=self.axis))) if w.size else jnp.zeros((), w.dtype)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        if u.size == 0:
            return u
        b = metric * u
        lines, metrics = (
            jnp.moveaxis(jnp.broadcast_to(x, b.shape), self.axis, -1) for x in (b, metric)
        )
        solve = functools.partial(_minimise_line, strength=strength)
        for _ in lines.shape[:-1]:
            solve = jax.vmap(solve)
        return jnp.moveaxis(solve(lines, metrics), -1, self.axis)

    def support(self, w: ArrayLike) -> jax.Array:
        return jnp.diff(jnp.asarray(w), axis=self.axis) != 0.0

    def coupled_axes(self, ndim: int) -> tuple[int, ...]:
        return normalize_axes(self.axis, ndim, "axis")

    def check(self, shape: tuple[int, ...]) -> None:
        (axis,) = self.coupled_axes(len(shape))
        if shape[axis] < 2:
            raise ValueError(
                f"{self} needs two entries or more along axis {axis} of a leaf of shape "
                f"{tuple(shape)}; leave this leaf plain"
            )


def _minimise_line(b: jax.Array, metric: jax.Array, *, strength: jax.Array) -> jax.Array:
    """One line, (n,). Each piece has the mean that its entries and the jumps at its ends give."""
    w = _pieces(*jax.lax.stop_gradient((b, metric, strength)))
    # The dynamic programme says where the pieces are; their values are summed piece by piece.
    rises = jnp.sign(jnp.diff(w))
    piece = jnp.cumsum(jnp.pad(jnp.abs(rises), (1, 0))).astype(jnp.int32)
    push = strength * (jnp.pad(rises, (0, 1)) - jnp.pad(rises, (1, 0)))

    def total(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x, piece, num_segments=b.size)[piece]

    return total(b + push) / total(metric)


class _Knots(NamedTuple):
    """A piecewise-linear derivative: what each knot adds to the line on its left."""

    place: jax.Array  # (2 n,): increasing from index `first` to `last`, unused elsewhere
    slope: jax.Array  # (2 n,)
    level: jax.Array  # (2 n,)
    first: jax.Array  # () int32
    last: jax.Array  # () int32


def _pieces(b: jax.Array, metric: jax.Array, strength: jax.Array) -> jax.Array:
    """The minimiser of one line, with neighbours in a piece exactly equal.

    Of the best cost of the first k entries, as a function of the last of them, the next entry feels
    the derivative, clipped to plus and minus the strength. Where it is clipped are the limits
    between which entry k is as the next one is; the last entry is where the derivative is 0.
    """
    n = b.size
    blank = jnp.zeros((2 * n,), b.dtype)
    start = _Knots(blank, blank, blank, jnp.int32(n), jnp.int32(n - 1))
    felt = jnp.full((n,), strength, b.dtype).at[0].set(0.0)  # nothing comes before the first entry

    def limits(knots: _Knots, entry: tuple[jax.Array, ...]) -> tuple[_Knots, tuple[jax.Array, ...]]:
        m, b, felt = entry
        left, right = (m, -felt - b), (m, felt - b)
        i, low, (low_slope, low_level) = _walk(knots, left, -strength, knots.first, knots.last, 1)
        j, high, (high_slope, high_level) = _walk(knots, right, strength, knots.last, i, -1)
        i, j = i - 1, j + 1
        return _Knots(
            knots.place.at[i].set(low).at[j].set(high),
            knots.slope.at[i].set(low_slope).at[j].set(-high_slope),
            knots.level.at[i].set(low_level + strength).at[j].set(strength - high_level),
            i,
            j,
        ), (low, high)

    entries = (metric, b, felt)
    knots, ends = jax.lax.scan(limits, start, jax.tree.map(lambda x: x[:-1], entries))
    line = metric[-1], -felt[-1] - b[-1]
    _, last, _ = _walk(knots, line, jnp.zeros_like(strength), knots.first, knots.last, 1)

    def follow(after: jax.Array, ends: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        w = jnp.clip(after, *ends)
        return w, w

    _, w = jax.lax.scan(follow, last, ends, reverse=True)
    return jnp.append(w, last)


def _walk(
    knots: _Knots,
    line: tuple[jax.Array, jax.Array],
    height: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    step: int,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Where a derivative reaches a height, from the line at one end: next knot, place, line."""

    def falls_short(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, slope, level = carry
        reached = step * (slope * knots.place[i] + level - height) >= 0
        return (step * (stop - i) >= 0) & ~reached

    def pass_knot(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, slope, level = carry
        return i + step, slope + step * knots.slope[i], level + step * knots.level[i]

    i, slope, level = jax.lax.while_loop(falls_short, pass_knot, (start, *line))
    return i, (height - level) / slope, (slope, level)
