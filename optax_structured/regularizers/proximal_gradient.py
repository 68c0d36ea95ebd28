r"""Proximal gradient for a subproblem in a diagonal metric: as published, and accelerated.

.. math:: Q(w) = \langle v, w\rangle + \tfrac12 \langle w - w_0, P\,(w - w_0)\rangle
          + \tau\,\psi(w), \qquad P > 0

Entries that the regularizer couples (`Regularizer.coupled_axes`: a group, a matrix) share the step
:math:`1/L`, :math:`L = \max P` over that unit: a prox in a constant metric has a closed form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, promote
from optax_structured.regularizers.certificate import free_subgradient, subgradient_bound
from optax_structured.regularizers.group import ShrunkGroups


class Solution(NamedTuple):
    """Where an iterative solver stopped."""

    point: jax.Array  # like the linear term
    iterations: jax.Array  # () int32, of the slowest unit


def step_size_metric(regularizer: Regularizer, metric: jax.Array) -> jax.Array:
    """The largest entry of `metric` in each coupled unit, with ones on the coupled axes."""
    return jnp.max(metric, axis=regularizer.coupled_axes(metric.ndim), keepdims=True)


def majorised_step(
    regularizer: Regularizer,
    b: jax.Array,
    metric: jax.Array,
    peak: jax.Array,
    strength: jax.Array,
    y: jax.Array,
) -> jax.Array:
    r"""One proximal-gradient step from `y`: the minimiser with :math:`P` raised to :math:`L`.

    In linear form (:math:`b = P w_0 - v`) the step is the regularizer's own closed form
    :math:`\mathrm{prox}((b + (L - P)\,y)/L,\; L,\; \tau)`; from :math:`y = 0` it is the zero test.
    """
    return regularizer.prox((b + (peak - metric) * y) / peak, peak, strength)


def certainly_zero(regularizer: Regularizer, b: jax.Array, strength: jax.Array) -> jax.Array:
    """Entries in groups whose minimiser is zero for every metric, broadcastable to `b`."""
    if not isinstance(regularizer, ShrunkGroups):
        return jnp.zeros((), bool)
    shrunk, threshold = regularizer.shrunk(b, strength)
    return jnp.expand_dims(regularizer.norms(shrunk) <= threshold, regularizer.coupled_axes(b.ndim))


def proximal_gradient(
    regularizer: Regularizer,
    linear: ArrayLike,
    metric: ArrayLike,
    centre: ArrayLike,
    strength: ArrayLike,
    start: ArrayLike,
    *,
    max_iters: int = 100,
    rtol: float = 1e-8,
) -> Solution:
    r"""The published inexact solver of RAMDA and ProxAdamW, to the iteration.

    Groups whose minimiser is certainly zero (`certainly_zero`) are set to zero first. Then

    .. math::
        w_{i+1} &= \mathrm{prox}\bigl(w_i - \tfrac1L (v + P (w_i - w_0)),\, L,\, \tau\bigr) \\
        \text{stop when } i &\ge 1 \text{ and } q_{i-1} - q_i < \text{rtol}\,(|q_i| + 1)

    where :math:`q_i` is :math:`Q(w_{i+1})` over the units that are left, and return the iterate at
    which it stopped: 2 iterations at least. The scale in the test is absolute, so late in training,
    when :math:`|q| \ll 1`, it is met after 2 iterations independent of the accuracy.

    Equals the exact solution where the regularizer couples nothing or the metric is constant.

    Args:
        regularizer: any; one whose prox in a constant metric has a closed form.
        linear: :math:`v`, any shape.
        metric: :math:`P > 0`, a scalar or like `linear`.
        centre: :math:`w_0`, like `linear`.
        strength: :math:`\tau \ge 0`, a scalar.
        start: the first iterate, like `linear`; published: the current parameters.
        max_iters: at least 1; published 100, for the nuclear norm 5.
        rtol: published 1e-8, for the nuclear norm 1e-3.

    Returns:
        The point and the number of iterations. One stopping test holds for the whole leaf.

    Reference: Huang and Lee, *Regularized Adaptive Momentum Dual Averaging with an Efficient
    Inexact Subproblem Solver*, 2024, algorithm 2. The paper takes the step from the largest entry
    of the whole metric and leaves the prox unscaled; as in its experiments, the step here is per
    group or matrix, and the prox is scaled by it.
    """
    linear, metric, strength = promote(linear, metric, strength)
    metric = jnp.broadcast_to(metric, linear.shape)
    centre, start = jnp.asarray(centre, linear.dtype), jnp.asarray(start, linear.dtype)
    if linear.size == 0:
        return Solution(start, jnp.zeros((), jnp.int32))
    b = metric * centre - linear
    peak = step_size_metric(regularizer, metric)
    dropped = certainly_zero(regularizer, b, strength)

    def objective(w: jax.Array) -> jax.Array:
        offset = w - centre
        smooth = offset * (linear + 0.5 * metric * offset)
        return jnp.sum(jnp.where(dropped, 0.0, smooth)) + strength * regularizer.value(w)

    Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def unfinished(carry: Carry) -> jax.Array:
        i, _, _, going = carry
        return going & (i < max_iters)

    def step(carry: Carry) -> Carry:
        i, w, q, _ = carry
        w = jnp.where(dropped, 0.0, majorised_step(regularizer, b, metric, peak, strength, w))
        q_next = objective(w)
        # Written so that NaN stops.
        return i + 1, w, q_next, (i < 1) | (q - q_next >= rtol * (jnp.abs(q_next) + 1))

    first = jnp.zeros((), jnp.int32), start, jnp.zeros((), linear.dtype), jnp.bool_(True)
    iterations, w, _, _ = jax.lax.while_loop(unfinished, step, first)
    return Solution(w, iterations)


def accelerated_proximal_gradient(
    regularizer: Regularizer,
    b: ArrayLike,
    metric: ArrayLike,
    strength: ArrayLike,
    start: ArrayLike,
    *,
    max_iters: int,
    rtol: float,
) -> Solution:
    r"""Proximal gradient with momentum and restarts, run to a certified accuracy.

    The momentum is FISTA's, put back to zero whenever it points uphill,
    :math:`\langle y - w^+, w^+ - w\rangle > 0`; the number of steps grows with
    :math:`\sqrt{\max P / \min P}`. Each unit stops on its own, once its free subgradient
    (`free_subgradient`) certifies

    .. math:: \sum_i s_i^2 / P_i \le \text{rtol}^2 \sum_i b_i^2 / P_i
              \;\Rightarrow\; \|w - w^*\|_P \le \text{rtol}\,\|b/P\|_P

    or its steps have come down to rounding error. Under `vmap` all run as long as the slowest.

    Args:
        regularizer: convex, with a closed form in a constant metric.
        b: :math:`P w_0 - v`, any shape.
        metric: :math:`P > 0`, a scalar or like `b`.
        strength: :math:`\tau \ge 0`, a scalar.
        start: the first iterate. Zero makes the first step the exact zero test, and was as good as
            the current parameters wherever it was measured.
        max_iters: the cap on the number of steps.
        rtol: relative accuracy in the norm of the metric, above sqrt(kappa) times rounding error.

    Returns:
        The point, which came out of a prox and so has its exact zeros or rank, and the number of
        iterations of the slowest unit.

    Reference: Beck and Teboulle (2009); the restart is from O'Donoghue and Candès (2015).
    """
    b, metric, strength = promote(b, metric, strength)
    metric, start = jnp.broadcast_to(metric, b.shape), jnp.asarray(start, b.dtype)
    if b.size == 0:
        return Solution(start, jnp.zeros((), jnp.int32))
    axes = regularizer.coupled_axes(b.ndim)
    peak = step_size_metric(regularizer, metric)
    target = rtol**2 * subgradient_bound(b, metric, axes)
    rounding = 16 * jnp.finfo(b.dtype).eps

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=axes, keepdims=True)

    Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]

    def unfinished(carry: Carry) -> jax.Array:
        i, *_, going = carry
        return jnp.any(going) & (i < max_iters)

    def step(carry: Carry) -> Carry:
        i, w, y, t, going = carry
        new = jnp.where(going, majorised_step(regularizer, b, metric, peak, strength, y), w)
        bound = subgradient_bound(free_subgradient(metric, peak, y, new), metric, axes)
        moved = total(jnp.square(y - new)) > rounding**2 * total(jnp.square(new))
        uphill = total((y - new) * (new - w)) > 0
        longer = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        y = new + jnp.where(uphill, 0.0, (t - 1) / longer) * (new - w)
        # Written so that NaN stops.
        return i + 1, new, y, jnp.where(uphill, 1.0, longer), going & moved & (bound > target)

    ones = jnp.ones_like(peak)
    first = jnp.zeros((), jnp.int32), start, start, ones, ones > 0
    iterations, w, *_ = jax.lax.while_loop(unfinished, step, first)
    return Solution(w, iterations)
