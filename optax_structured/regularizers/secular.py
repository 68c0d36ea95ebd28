r"""Exact minimiser of a group-lasso subproblem in a diagonal metric, by one scalar root per group.

For one group, with linear term :math:`b`, metric :math:`P > 0` and threshold :math:`t`,

.. math::
    w^* = \arg\min_w \tfrac12 \langle w, P w\rangle - \langle b, w\rangle + t\,\|w\|_2

is zero iff :math:`\|b\| \le t`. Otherwise, with :math:`\theta = \|w^*\|`,

.. math:: w^*_i = \frac{b_i}{P_i + t/\theta}, \qquad
    \varphi(\theta) = \sum_i \Big(\frac{b_i}{\theta P_i + t}\Big)^2 = 1.

:math:`f = \varphi^{-1/2} - 1` is increasing and concave, and linear where :math:`P` is constant. So
its tangent at 0, and then secants, approach the root from below and need no safeguard: a handful of
secant steps (one reduction each) reach float32 rounding for the metrics of training. Metrics of
extreme spread take a fixed block of bracketed steps more, behind one `lax.cond`, so that
nobody else pays for them.
"""

import functools

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]

_STEPS = 5
_MORE_STEPS = 14


@functools.partial(jax.jit, static_argnames="axes")
def solve_group(
    b: jax.Array,
    metric: jax.Array,
    threshold: jax.Array | float,
    axes: Axes,
) -> jax.Array:
    r"""Minimises :math:`\tfrac12\langle w,Pw\rangle - \langle b,w\rangle + t\|w\|_2` in each group.

    Args:
      b: linear term, any shape.
      metric: the diagonal :math:`P > 0`: an array like `b`, or a scalar (then in closed form).
      threshold: :math:`t \ge 0`, a scalar, or one per group (`b.shape` with ones on `axes`).
      axes: the axes of `b` inside a group; each index of the others is a group of its own.

    Returns:
      The minimiser, like `b`; entries of dead groups are exactly zero. Relative error at rounding
      level (float32 and float64) divided by the group's distance from its threshold.

    Example:
      >>> import jax.numpy as jnp
      >>> b = jnp.array([[3.0, 4.0], [0.3, 0.4]])
      >>> print(solve_group(b, jnp.array([[1.0, 1.0], [1.0, 2.0]]), 1.0, axes=(1,)))
      [[2.4 3.2]
       [0.  0. ]]
    """
    metric = jnp.asarray(metric, b.dtype)
    threshold = jnp.maximum(jnp.asarray(threshold, b.dtype), jnp.finfo(b.dtype).tiny)

    # phi(0). A threshold of (nearly) nothing overflows it: those groups are not shrunk at all.
    square = _total(jnp.square(b * (1 / threshold)), axes)
    dead, unshrunk = square <= 1, jnp.isinf(square)
    if metric.ndim == 0:
        norm = jnp.sqrt(jnp.where(dead, 4.0, square))
        return jnp.where(dead, 0.0, b * ((1 - 1 / norm) / metric))
    pull = jnp.where(unshrunk, 0.0, threshold / _root(b, metric, threshold, square, axes))
    return jnp.where(dead, 0.0, b / (metric + pull))


def _total(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=True)


def _root(
    b: jax.Array, metric: jax.Array, threshold: jax.Array, square: jax.Array, axes: Axes
) -> jax.Array:
    """Where phi(theta) = 1 per group, given phi(0) = `square`; some number if dead or unshrunk."""
    # What is small is written so that few arrays are stored: each costs XLA a kernel to compile.
    alive = (square > 1) & ~jnp.isinf(square)
    norm = jnp.sqrt(jnp.where(alive, square, 4.0))

    def phi(theta: jax.Array) -> jax.Array:
        return _total(jnp.square(b / (theta * metric + threshold)), axes)

    def secant(theta0: jax.Array, phi0: jax.Array, theta1: jax.Array, phi1: jax.Array) -> jax.Array:
        """Where the line through two points of f is zero; the second point if f does not rise."""
        f0, f1 = (jax.lax.rsqrt(jnp.where(alive, x, 1.0)) - 1 for x in (phi0, phi1))
        rises = f1 > f0
        share = jnp.where(rises, f1 / jnp.where(rises, f1 - f0, 1.0), 0.0)
        return theta1 + share * (theta0 - theta1)

    def approach(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        theta0, phi0, theta1 = carry
        phi1 = phi(theta1)
        return theta1, phi1, secant(theta0, phi0, theta1, phi1)

    slope = _total(jnp.square(b * (1 / (norm * threshold))) * metric, axes)
    tangent = jnp.where(alive, threshold * (norm - 1) / jnp.where(alive, slope, 1.0), threshold)
    start = jnp.zeros_like(tangent), square, tangent
    last, phi_last, theta = jax.lax.fori_loop(0, _STEPS, approach, start)

    def approach_any(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        theta0, phi0, low, high = carry
        # While the bracket is wide it is halved, in logarithms; then come secants from below.
        theta1 = jnp.where(high > 4 * low, jnp.sqrt(low) * jnp.sqrt(high), low)
        phi1 = phi(theta1)
        below = phi1 >= 1
        low = jnp.where(below, secant(theta0, phi0, theta1, phi1), low)
        high = jnp.where(below, high, theta1)
        return jnp.where(below, theta1, theta0), jnp.where(below, phi1, phi0), low, high

    def any_metric(theta: jax.Array) -> jax.Array:
        spread = jnp.where(alive, _total(jnp.square(b / (theta * metric)), axes), 1.0)
        high = theta * jnp.sqrt(spread) * (1 - 1 / norm)  # where the chord to infinity is 0
        return jax.lax.fori_loop(0, _MORE_STEPS, approach_any, (last, phi_last, theta, high))[2]

    # The error after a secant step is far below the step itself.
    unsure = alive & (jnp.abs(theta - last) > jnp.finfo(theta.dtype).eps ** 0.6 * theta)
    converged = jnp.sum(unsure, dtype=theta.dtype) == 0
    return jax.lax.cond(converged, lambda theta: theta, any_metric, theta)
