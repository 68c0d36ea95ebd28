"""Convex penalties on single entries: l1 and the elastic net, by soft thresholding."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Norm, Regularizer, promote
from optax_structured.trees.checks import check_nonnegative
from optax_structured.trees.precision import at_least_float32


def soft(x: jax.Array, threshold: jax.Array) -> jax.Array:
    r""":math:`\operatorname{sign}(x) \max(|x| - \text{threshold}, 0)`, exactly zero below it."""
    return x - jnp.clip(x, -threshold, threshold)


@dataclasses.dataclass(frozen=True)
class L1(Norm):
    r"""The lasso penalty: entries become exactly zero one by one.

    .. math:: \psi(w) = \sum_i |w_i|, \qquad
        \mathrm{prox}(u, m, \tau)_i
            = \operatorname{sign}(u_i) \max(|u_i| - \tau / m_i, 0)

    Any leaf can take it. The support is one bool per entry, and an entry is zero iff
    :math:`|m_i u_i| \le \tau`, for every metric. Equals `ElasticNet(l2=0.0)`, and
    `GroupLasso` on groups of one entry.

    References:
      Tibshirani, Regression shrinkage and selection via the lasso, JRSS B, 1996.

    >>> import jax.numpy as jnp
    >>> metric = jnp.array([1.0, 1.0, 4.0])
    >>> print(L1().prox(jnp.array([3.0, -0.5, -2.0]), metric, strength=1.0))
    [ 2.    0.   -1.75]
    """

    def value(self, w: ArrayLike) -> jax.Array:
        return jnp.sum(jnp.abs(at_least_float32(w)))

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        return soft(metric * u, strength) / metric

    def dual_norm(self, y: ArrayLike) -> jax.Array:
        return jnp.max(jnp.abs(at_least_float32(y)), initial=0.0)


@dataclasses.dataclass(frozen=True)
class ElasticNet(Regularizer):
    r"""The lasso with a share of squared norm: sparse, and survivors shrink in proportion.

    .. math:: \psi(w) = \sum_i |w_i| + \tfrac{l_2}{2} w_i^2, \qquad
        \mathrm{prox}(u, m, \tau)_i
            = \operatorname{sign}(u_i)\,\frac{\max(|m_i u_i| - \tau, 0)}{m_i + \tau l_2}

    The squared term does not decide what is zero. Equals `L1` at `l2=0.0`.

    Args:
      l2: weight of the squared term relative to the absolute one, at least 0; useful range 0.01
        to 10.

    Raises:
      ValueError: `l2` is negative, infinite or NaN.

    References:
      Zou and Hastie, Regularization and variable selection via the elastic net, JRSS B, 2005.

    >>> import jax.numpy as jnp
    >>> print(ElasticNet(l2=1.0).prox(jnp.array([3.0, -0.5]), metric=1.0, strength=1.0))
    [1. 0.]
    """

    l2: float = 1.0

    def __post_init__(self) -> None:
        check_nonnegative("l2", self.l2)

    def value(self, w: ArrayLike) -> jax.Array:
        w = at_least_float32(w)
        return jnp.sum(jnp.abs(w) + self.l2 / 2 * jnp.square(w))

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        return soft(metric * u, strength) / (metric + strength * self.l2)
