"""Penalties that start like l1 and level off, so that large entries are not shrunk: MCP and SCAD.

Both have a scale of their own, the threshold: a field, whereas the strength multiplies the whole
penalty and may follow a schedule. Where the metric is small the subproblem has two valleys; the
closed forms then compare them, which amounts to a larger hard threshold.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, promote
from optax_structured.regularizers.entrywise import soft
from optax_structured.trees.checks import check_positive
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class MCP(Regularizer):
    r"""The minimax concave penalty: firm thresholding.

    With L the threshold,

    .. math:: \psi(w) = \sum_i \begin{cases} L|w_i| - w_i^2/(2\gamma) & |w_i| \le \gamma L \\
            \gamma L^2/2 & \text{else} \end{cases}

    and, with :math:`r = \tau/(\gamma m)`, per entry

    .. math:: \mathrm{prox}(u, m, \tau) = \begin{cases}
            u & |u| > \gamma L \sqrt{\max(r, 1)} \\
            \operatorname{sign}(u) \max(|u| - r\gamma L, 0)/(1 - r) & \text{else, if } r < 1 \\
            0 & \text{else} \end{cases}

    For :math:`r < 1` the subproblem is convex, and an entry is zero iff :math:`|m u| \le \tau L`.
    For :math:`r \ge 1` (a metric below :math:`\tau/\gamma`) it is not: the last line compares the
    two valleys, 0 and `u`, and prefers 0 on a tie. The usual penalty of parameter lambda is
    `MCP(threshold=lambda)` at strength 1 (or the learning rate). At strength c and `gamma` to
    infinity with `threshold=1` it equals `L1` at strength c.

    Args:
      threshold: L, in units of the slope of psi at zero, above 0.
      gamma: psi is constant beyond `gamma * threshold`; above 0; 3 is usual, 1 to 1e3 useful.

    Raises:
      ValueError: an argument is not above 0.

    References:
      Zhang, Nearly unbiased variable selection under minimax concave penalty, Annals of
      Statistics, 2010.

    >>> import jax.numpy as jnp
    >>> u = jnp.array([4.0, 2.0, -0.5])
    >>> print(MCP(threshold=1.0, gamma=3.0).prox(u, metric=1.0, strength=1.0).round(1))
    [4.  1.5 0. ]
    """

    threshold: float = 1.0
    gamma: float = 3.0

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        check_positive("gamma", self.gamma)

    def value(self, w: ArrayLike) -> jax.Array:
        size = jnp.minimum(jnp.abs(at_least_float32(w)), self.gamma * self.threshold)
        return jnp.sum(self.threshold * size - jnp.square(size) / (2 * self.gamma))

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        radius = self.gamma * self.threshold
        ratio = strength / (self.gamma * metric)
        convex = ratio < 1
        firm = soft(u, ratio * radius) / jnp.where(convex, 1 - ratio, 1.0)
        free = jnp.abs(u) > radius * jnp.sqrt(jnp.maximum(ratio, 1.0))
        return jnp.where(free, u, jnp.where(convex, firm, 0.0))


@dataclasses.dataclass(frozen=True)
class SCAD(Regularizer):
    r"""The smoothly clipped absolute deviation: like l1 up to L, level beyond a L.

    With L the threshold,

    .. math:: \psi(w) = \sum_i \begin{cases} L|w_i| & |w_i| \le L \\
            (2aL|w_i| - w_i^2 - L^2)/(2(a-1)) & L < |w_i| \le aL \\
            (a+1)L^2/2 & \text{else} \end{cases}

    and, with :math:`r = \tau/m`, per entry

    .. math:: \mathrm{prox}(u, m, \tau) = \begin{cases}
            u & |u| > LB \\
            ((a-1)u - \operatorname{sign}(u)\,raL)/(a-1-r) & L(1+r) < |u| \le LB,\ r < a-1 \\
            \operatorname{sign}(u)\max(|u| - rL, 0) & \text{else} \end{cases}

    with :math:`B = a` while :math:`r < a-1`, where the subproblem is convex and an entry is zero
    iff :math:`|m u| \le \tau L`. For a smaller metric the inner and the outer valley are equally
    deep at :math:`B = (r+a+1)/2`, or :math:`B = \sqrt{r(a+1)}` once :math:`r \ge a+1`; the inner
    one is preferred on a tie. The usual penalty of parameter lambda is `SCAD(threshold=lambda)` at
    strength 1 (or the learning rate).

    Args:
      threshold: L, in units of the slope of psi at zero, above 0.
      a: psi is constant beyond `a * threshold`; above 2; 3.7 is usual.

    Raises:
      ValueError: the threshold is not above 0, or `a` not above 2.

    References:
      Fan and Li, Variable selection via nonconcave penalized likelihood and its oracle
      properties, JASA, 2001.

    >>> import jax.numpy as jnp
    >>> u = jnp.array([4.0, 2.5, -1.5, 0.5])
    >>> print(SCAD(threshold=1.0, a=3.0).prox(u, metric=1.0, strength=1.0))
    [ 4.   2.  -0.5  0. ]
    """

    threshold: float = 1.0
    a: float = 3.7

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        if not self.a > 2:
            raise ValueError(f"SCAD: a must be above 2, got {self.a!r}")

    def value(self, w: ArrayLike) -> jax.Array:
        size = jnp.abs(at_least_float32(w))
        inner = jnp.minimum(size, self.threshold)
        # The slope falls linearly from L at L to 0 at a L; this is its integral.
        middle = jnp.clip(size, self.threshold, self.a * self.threshold) - self.threshold
        bend = jnp.square(middle) / (2 * (self.a - 1))
        return jnp.sum(self.threshold * (inner + middle) - bend)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        size, ratio, span = jnp.abs(u), strength / metric, self.a - 1
        convex = ratio < span
        middle = (span * u - jnp.sign(u) * ratio * self.a * self.threshold) / jnp.where(
            convex, span - ratio, 1.0
        )
        two_valleys = jnp.where(
            ratio < self.a + 1, (ratio + self.a + 1) / 2, jnp.sqrt(ratio) * (self.a + 1) ** 0.5
        )
        inner = soft(u, ratio * self.threshold)
        bent = jnp.where(convex & (size > self.threshold * (1 + ratio)), middle, inner)
        return jnp.where(size > self.threshold * jnp.where(convex, self.a, two_valleys), u, bent)
