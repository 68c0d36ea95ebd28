"""Constraints as regularizers: the value is 0 inside and infinite outside, the prox projects."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, promote
from optax_structured.regularizers.entrywise import L1, ElasticNet
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class Box(Regularizer):
    r"""Every entry stays between two bounds.

    .. math:: \psi(w) = \phi(w) \text{ if } low \le w_i \le high \text{ for all } i,
        \text{ else } \infty, \qquad
        \mathrm{prox}(u, m, \tau) = \min(\max(\mathrm{prox}_\phi(u, m, \tau), low), high)

    where :math:`\phi` is another penalty on the entries, or 0: then the prox projects, whatever the
    metric and the strength. A strength of 0 does not lift the constraint.

    Args:
      low: lower bound of every entry, in units of the parameter; may be minus infinity.
      high: upper bound, above `low`; may be infinity.
      penalty: `L1` or `ElasticNet`, or None. (One that couples entries or is not convex cannot be
        clipped after the fact.)

    Raises:
      ValueError: `low` is not below `high`.
      TypeError: another penalty.

    >>> import jax.numpy as jnp
    >>> print(Box(-1.0, 0.5).prox(jnp.array([-3.0, 0.2, 2.0]), metric=1.0, strength=1.0))
    [-1.   0.2  0.5]
    """

    constraint: ClassVar[bool] = True
    low: float = -1.0
    high: float = 1.0
    penalty: L1 | ElasticNet | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Box needs low < high, got low={self.low!r} and high={self.high!r}")
        if not (self.penalty is None or isinstance(self.penalty, L1 | ElasticNet)):
            raise TypeError(
                f"Box takes L1(...) or ElasticNet(...) as penalty, got {self.penalty!r}"
            )

    @property
    def penalizes(self) -> bool:
        return self.penalty is not None

    def value(self, w: ArrayLike) -> jax.Array:
        w = at_least_float32(w)
        inside = jnp.all((self.low <= w) & (w <= self.high))
        penalty = self.penalty.value(w) if self.penalty else 0.0
        return jnp.where(inside, penalty, jnp.inf).astype(w.dtype)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        point = self.penalty.prox(u, metric, strength) if self.penalty else u
        return jnp.clip(point, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class NonNegative(Regularizer):
    r"""Every entry stays at or above zero.

    .. math:: \psi(w) = 0 \text{ if } w_i \ge 0 \text{ for all } i, \text{ else } \infty, \qquad
        \mathrm{prox}(u, m, \tau) = \max(u, 0)

    for every metric and strength. Equals `Box(0.0, inf)`.

    >>> import jax.numpy as jnp
    >>> print(NonNegative().prox(jnp.array([-3.0, 0.2]), metric=1.0, strength=1.0))
    [0.  0.2]
    """

    constraint: ClassVar[bool] = True

    def value(self, w: ArrayLike) -> jax.Array:
        w = at_least_float32(w)
        return jnp.where(jnp.all(w >= 0), 0.0, jnp.inf).astype(w.dtype)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, _, _ = promote(u, metric, strength)
        return jnp.maximum(u, 0.0)
