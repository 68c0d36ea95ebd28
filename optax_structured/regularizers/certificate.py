r"""How far a point is at most from the minimum of a subproblem, from that point alone.

A subproblem in linear form has the metric :math:`P > 0`, the linear term :math:`b` and a norm
:math:`\psi`:

.. math:: Q(w) = \tfrac12 \langle w, P w\rangle - \langle b, w\rangle + \tau\,\psi(w)

Two bounds on :math:`Q(w) - \min Q`. A subgradient :math:`s \in \partial Q(w)` gives
:math:`\tfrac12 \sum_i s_i^2 / P_i`, as :math:`Q` is 1-strongly convex in the norm of :math:`P`; a
proximal-gradient step yields one for free. The duality gap needs :math:`\psi`'s dual norm, and is
the sharper one where some entries of :math:`P` are tiny.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, dual_norm, promote


def free_subgradient(
    metric: ArrayLike, peak: ArrayLike, before: ArrayLike, after: ArrayLike
) -> jax.Array:
    r"""An exact subgradient of :math:`Q` at the end of a proximal-gradient step, for one product.

    If :math:`w^+ = \mathrm{prox}(y - \nabla(y)/L,\, L,\, \tau)` then

    .. math:: s = (L - P)\,(y - w^+) \in \partial Q(w^+)

    (add :math:`\nabla(w^+) - \nabla(y) = P (w^+ - y)` to the optimality condition of the step).
    Equals zero where the metric is constant: one step is exact there.

    Args:
        metric: :math:`P`, like the point.
        peak: :math:`L \ge P`, a scalar or one number per unit that shares a step.
        before: :math:`y`, where the step started.
        after: :math:`w^+`, where it ended.

    Returns:
        :math:`s`, like the point.
    """
    return (jnp.asarray(peak) - jnp.asarray(metric)) * (jnp.asarray(before) - jnp.asarray(after))


def subgradient_bound(
    subgradient: ArrayLike, metric: ArrayLike, axes: tuple[int, ...] | None = None
) -> jax.Array:
    r""":math:`\tfrac12 \sum_i s_i^2/P_i`, which :math:`Q(w) - \min Q` cannot exceed.

    Its double bounds :math:`\|w - w^*\|_P^2`.

    Args:
        subgradient: :math:`s \in \partial Q(w)`.
        metric: :math:`P > 0`, a scalar or like the point.
        axes: sum over these axes only and keep them, for one bound per independent unit; None
            (default) sums everything to a scalar.
    """
    s, metric, _ = promote(subgradient, metric, 0.0)
    # In this order a common scale of s and P cannot underflow.
    return 0.5 * jnp.sum(s * (s / metric), axis=axes, keepdims=axes is not None)


def duality_gap(
    regularizer: Regularizer, b: ArrayLike, metric: ArrayLike, strength: ArrayLike, w: ArrayLike
) -> jax.Array:
    r"""The duality gap of :math:`w`, for a regularizer that is a norm.

    With the residual :math:`r = b - P w`, scaled into the dual ball,
    :math:`y = r \min(1, \tau/\psi^*(r))`, and written so that nothing large cancels,

    .. math:: \mathrm{gap} = \bigl(\tau\,\psi(w) - \langle y, w\rangle\bigr)
              + \tfrac12 \sum_i (r_i - y_i)^2 / P_i \;\ge\; Q(w) - \min Q.

    Args:
        regularizer: a `Norm`.
        b: linear term, any shape.
        metric: :math:`P > 0`, a scalar or like `b`.
        strength: :math:`\tau \ge 0`, a scalar.
        w: the point to be judged, like `b`.

    Returns:
        A scalar of at least 0, up to rounding.

    Raises:
        TypeError: `regularizer` is not a norm.
    """
    b, metric, strength = promote(b, metric, strength)
    w = jnp.asarray(w, b.dtype)
    residual = b - metric * w
    norm = dual_norm(regularizer, residual)
    outside = norm > strength
    y = residual * jnp.where(outside, strength / jnp.where(outside, norm, 1.0), 1.0)
    slack = strength * regularizer.value(w) - jnp.sum(y * w)
    return jnp.maximum(slack, 0.0) + subgradient_bound(residual - y, metric)


def certificate(
    regularizer: Regularizer,
    b: ArrayLike,
    metric: ArrayLike,
    strength: ArrayLike,
    w: ArrayLike,
    subgradient: ArrayLike | None = None,
) -> jax.Array:
    r"""An upper bound on :math:`Q(w) - \min Q`: the smaller of the two above.

    Args:
        regularizer, b, metric, strength, w: as in `duality_gap`.
        subgradient: of :math:`Q` at `w` (`free_subgradient`); None leaves the duality gap alone.

    Returns:
        A scalar; :math:`\|w - w^*\|_P \le \sqrt{2 \cdot \mathrm{certificate}}`.

    Raises:
        TypeError: `regularizer` is not a norm.

    >>> import jax.numpy as jnp
    >>> from optax_structured.regularizers.nuclear import NuclearNorm
    >>> b, metric = jnp.array([[2.0, 0.0], [0.0, 0.5]]), jnp.array([[1.0, 2.0], [2.0, 1.0]])
    >>> solution = jnp.array([[1.0, 0.0], [0.0, 0.0]])
    >>> print(certificate(NuclearNorm(), b, metric, 1.0, solution))
    0.0
    >>> print(certificate(NuclearNorm(), b, metric, 1.0, 0 * solution))  # Q(0) - Q(w*) = 0.5
    0.53125

    Reference: R. T. Rockafellar, *Convex Analysis* (1970), section 31, for the gap.
    """
    gap = duality_gap(regularizer, b, metric, strength, w)
    if subgradient is None:
        return gap
    return jnp.minimum(gap, subgradient_bound(subgradient, metric))
