r"""Powers below one, :math:`\sum_i |w_i|^q` with q = 0, 1/2, 2/3: survivors are (nearly) unshrunk.

All three jump: the minimiser is zero up to a threshold and at least half of `u` beyond. Written in
the ratio threshold / abs(u), which is below one for every survivor, the closed forms need no clamp
and neither overflow nor lose digits at any scale.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, promote
from optax_structured.trees.precision import at_least_float32


def _survivors(u: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which entries exceed the threshold (NaN does), and threshold / abs(u) there, 0 elsewhere."""
    size = jnp.abs(u)
    dead = size <= threshold
    return ~dead, jnp.where(dead, 0.0, threshold) / jnp.where(dead, 1.0, size)


@dataclasses.dataclass(frozen=True)
class L0(Regularizer):
    r"""The number of nonzero entries: hard thresholding.

    .. math:: \psi(w) = \#\{i : w_i \ne 0\}, \qquad
        \mathrm{prox}(u, m, \tau)_i = u_i
            \text{ if } |u_i| > \sqrt{2\tau/m_i} \text{, else } 0

    Not convex: the prox is the global minimiser, and zero on a tie. Equals `GroupL0` with weight 1
    on groups of one entry.

    References:
      Yun, Lozano, Yang, Adaptive proximal gradient methods for structured neural networks,
      NeurIPS 2021.

    >>> import jax.numpy as jnp
    >>> print(L0().prox(jnp.array([2.0, 1.0, -1.5]), metric=1.0, strength=1.0))
    [ 2.   0.  -1.5]
    """

    def value(self, w: ArrayLike) -> jax.Array:
        w = at_least_float32(w)
        return jnp.sum(w != 0.0, dtype=w.dtype)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        # Not m u^2 / 2 > tau, which underflows.
        return jnp.where(jnp.abs(u) <= jnp.sqrt(2 * strength / metric), 0.0, u)


@dataclasses.dataclass(frozen=True)
class LHalf(Regularizer):
    r"""The sum of square roots: sparser than the lasso, with little bias on large entries.

    .. math:: \psi(w) = \sum_i |w_i|^{1/2}, \qquad
        \mathrm{prox}(u, m, \tau) = \tfrac23 u \left(1 + \cos\left(\tfrac23 \pi - \tfrac23
            \arccos \frac{r^{3/2}}{\sqrt2}\right)\right), \quad r = \frac{T}{|u|} < 1

    beyond the threshold :math:`T = \tfrac32 (\tau/m)^{2/3}`, and zero up to it. Not convex: this
    is the global minimiser, and zero on a tie.

    References:
      Xu, Chang, Xu, Zhang, L1/2 regularization, IEEE TNNLS, 2012. Yun, Lozano, Yang, NeurIPS 2021:
      their code adds 1e-4 to abs(u) inside the arccos and so deviates by about 1e-4; this does
      not.

    >>> import jax.numpy as jnp
    >>> print(LHalf().prox(jnp.array([4.0, 1.5, -0.5]), metric=1.0, strength=1.0).round(3))
    [3.742 0.    0.   ]
    """

    def value(self, w: ArrayLike) -> jax.Array:
        return _sum_of_powers(w, 1 / 2)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        keep, ratio = _survivors(u, 1.5 * jnp.square(jnp.cbrt(strength / metric)))
        angle = jnp.arccos(ratio**1.5 / 2**0.5)
        return jnp.where(keep, 2 / 3 * u * (1 + jnp.cos(2 / 3 * (jnp.pi - angle))), 0.0)


@dataclasses.dataclass(frozen=True)
class LTwoThirds(Regularizer):
    r"""The sum of powers 2/3: between the lasso and `LHalf`.

    .. math:: \psi(w) = \sum_i |w_i|^{2/3}, \qquad
        \mathrm{prox}(u, m, \tau) = u \left(\frac{a + \sqrt{2/a - a^2}}{2}\right)^3

    beyond the threshold :math:`T = \tfrac23 (24)^{1/4} (\tau/m)^{3/4}`, and zero up to it, with
    :math:`r = T/|u| < 1`, :math:`k = \tfrac34\sqrt3`, :math:`F = (k + \sqrt{k^2 - r^4})^{1/3}` and
    :math:`a^2 = \tfrac23 (27/16)^{1/6} (F + r^{4/3}/F)`. This is the usual form with cosh and
    arcosh, divided by :math:`|u|`. Not convex: the global minimiser, and zero on a tie.

    References:
      Yun, Lozano, Yang, Adaptive proximal gradient methods for structured neural networks,
      NeurIPS 2021: their code returns NaN below the threshold when the metric is tiny; this is
      zero there.

    >>> import jax.numpy as jnp
    >>> print(LTwoThirds().prox(jnp.array([4.0, 1.2, -0.5]), metric=1.0, strength=1.0).round(2))
    [3.56 0.   0.  ]
    """

    def value(self, w: ArrayLike) -> jax.Array:
        return _sum_of_powers(w, 2 / 3)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        root = jnp.sqrt(strength / metric)
        keep, ratio = _survivors(u, 2 / 3 * 24**0.25 * root * jnp.sqrt(root))
        k = 0.75 * 3**0.5
        big = jnp.cbrt(k + jnp.sqrt(k * k - ratio**4))
        a = jnp.sqrt(2 / 3 * (27 / 16) ** (1 / 6) * (big + ratio ** (4 / 3) / big))
        return jnp.where(keep, u * ((a + jnp.sqrt(2 / a - a * a)) / 2) ** 3, 0.0)


def _sum_of_powers(w: ArrayLike, power: float) -> jax.Array:
    # The power has an infinite slope at 0: zero entries keep their place but pass no gradient.
    w = at_least_float32(w)
    zero = w == 0.0
    return jnp.sum(jnp.where(zero, 0.0, jnp.where(zero, 1.0, jnp.abs(w)) ** power))
