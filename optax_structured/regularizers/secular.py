r"""Exact minimiser of a group-lasso subproblem in a diagonal metric, by one scalar root a group.

For one group, with linear term :math:`b`, metric :math:`P > 0` and threshold :math:`t`,

.. math::
    w^* = \arg\min_w \tfrac12 \langle w, P w\rangle - \langle b, w\rangle + t\,\|w\|_2

is zero iff :math:`\|b\| \le t`. Otherwise, with :math:`c = b/t` and :math:`y = \|w^*\|/t`,

.. math:: w^*_i = \frac{y\,b_i}{y P_i + 1}, \qquad \varphi(y) = \sum_i \frac{c_i^2}{(y P_i+1)^2} = 1.

:math:`f = \varphi^{-1/2} - 1` is increasing and concave, and linear when :math:`P` is constant in the
group. So the tangent at 0, then secants, then tangents approach the root from below and need no
safeguard: a handful of secant steps (one reduction each) reach float32 rounding for the metrics of
training. Metrics of extreme spread take a fixed block of bracketed Newton steps more, behind one
`lax.cond`, so that nobody else pays for them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]

_SECANT_STEPS = 5
_BRACKETED_STEPS = 18


def solve_group(
    b: jax.Array,
    metric: jax.Array,
    threshold: jax.Array | float,
    axes: Sequence[int],
) -> jax.Array:
    r"""Minimises :math:`\tfrac12\langle w,Pw\rangle - \langle b,w\rangle + t\|w\|_2` in each group.

    Args:
      b: linear term, any shape.
      metric: the diagonal :math:`P > 0`: an array like `b`, or a scalar (then in closed form).
      threshold: :math:`t \ge 0`, a scalar, or one a group (`b.shape` with ones on `axes`).
      axes: the axes of `b` inside a group; each index of the others is a group of its own.

    Returns:
      The minimiser, like `b`; entries of dead groups are exactly zero. Relative error at rounding
      level (float32 and float64) divided by the group's distance from its threshold.

    Example:
      >>> import jax.numpy as jnp
      >>> b = jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> print(solve_group(b, jnp.array([[1.0, 1.0], [1.0, 2.0]]), 1.0, axes=(1,)))
      [[2.4       3.2      ]
       [0.        0.       ]]
    """
    axes = tuple(axes)
    metric = jnp.asarray(metric, b.dtype)
    tiny = jnp.finfo(b.dtype).tiny
    inverse = 1 / jnp.maximum(jnp.asarray(threshold, b.dtype), tiny)

    square = _total(jnp.square(b * inverse), axes)
    dead = square <= 1
    # A threshold of (nearly) nothing overflows the norm: those groups are not shrunk at all.
    unshrunk = jnp.isinf(square)
    # A harmless stand-in wherever there is no root to find, so that no 0/0 arises.
    norm = jnp.sqrt(jnp.where(dead | unshrunk, 4.0, square))
    if metric.ndim == 0:
        shrink = jnp.where(unshrunk, 1.0, 1 - 1 / norm) / metric
        return jnp.where(dead, 0.0, b * shrink)
    y = _root(b, metric, jnp.where(dead | unshrunk, 0.0, inverse), norm, axes)
    return jnp.where(dead, 0.0, b / (metric + jnp.where(unshrunk, 0.0, 1 / y)))


def _total(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=True)


def _root(
    b: jax.Array, metric: jax.Array, scale: jax.Array, norm: jax.Array, axes: Axes
) -> jax.Array:
    """The root y > 0 of phi(y) = 1 a group, for c = b * scale of norm > 1 (any y where c = 0)."""

    def secant(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y0, f0, y1, _ = carry
        phi = _total(jnp.square(b * scale / (y1 * metric + 1)), axes)
        f1 = jax.lax.rsqrt(jnp.where(scale > 0, phi, 1.0)) - 1
        rise = f1 - f0
        step = jnp.where(rise > 0, -f1 / jnp.where(rise > 0, rise, 1.0), 0.0) * (y1 - y0)
        return y1, f1, y1 + step, step

    slope = _total(jnp.square(b * (scale / norm)) * metric, axes)
    tangent = (norm - 1) / jnp.where(scale > 0, slope, 1.0)
    start = jnp.zeros_like(tangent), 1 / norm - 1, tangent, tangent
    _, _, y, step = jax.lax.fori_loop(0, _SECANT_STEPS, secant, start)

    # The error after a secant step is far below the step itself.
    converged = jnp.abs(step) <= jnp.finfo(y.dtype).eps ** 0.6 * y
    return jax.lax.cond(
        jnp.all(converged | (scale == 0)),
        lambda y: y,
        lambda y: _bracketed(b, metric, scale, norm, axes, y),
        y,
    )


def _bracketed(
    b: jax.Array, metric: jax.Array, scale: jax.Array, norm: jax.Array, axes: Axes, low: jax.Array
) -> jax.Array:
    """The same root for any metric: tangents from below, halving the bracket while it is wide."""
    alive = scale > 0
    # xi = c/P bounds the root: tangent of phi^(-1/2) at infinity from below, chord from above.
    xi = b * scale / metric
    largest = jnp.max(jnp.abs(xi), axis=axes, keepdims=True)
    xi = xi / jnp.where(alive, largest, 1.0)
    square = jnp.where(alive, _total(jnp.square(xi), axes), 1.0)
    high = largest * jnp.sqrt(square) * (1 - 1 / norm)
    low = jnp.maximum(low, largest * jnp.sqrt(square) - _total(xi * xi / metric, axes) / square)

    def tangent(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        y = jnp.where(high > 4 * low, jnp.sqrt(low) * jnp.sqrt(high), low)
        square = jnp.square(b * scale / (y * metric + 1))
        phi = jnp.where(alive, _total(square, axes), 1.0)
        slope = jnp.where(alive, _total(square * (metric / (y * metric + 1)), axes), 1.0)
        newton = y + (jnp.sqrt(phi) - 1) * (phi / slope)
        return jnp.maximum(low, newton), jnp.where(phi <= 1, jnp.minimum(high, y), high)

    low, _ = jax.lax.fori_loop(0, _BRACKETED_STEPS, tangent, (low, high))
    return low
