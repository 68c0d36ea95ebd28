"""A penalty that draws weights to plus and minus one."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, promote
from optax_structured.regularizers.entrywise import soft
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class DistanceToSign(Regularizer):
    r"""The distance of each entry to the nearer of plus and minus one: weights end exactly binary.

    .. math:: \psi(w) = \sum_i \big||w_i| - 1\big|, \qquad
        \mathrm{prox}(u, m, \tau)_i = \sigma_i + S(u_i - \sigma_i, \tau/m_i), \quad
        \sigma_i = \operatorname{sign}(u_i)

    with the soft threshold S. Any leaf can take it; an entry is exactly :math:`\sigma_i` iff
    :math:`m_i |u_i - \sigma_i| \le \tau`. Not convex: the prox is the global minimiser. The support
    is one bool per entry: what is not binary yet.

    Args:
      keep_zeros: what is exactly 0 stays 0 and counts as binary, as in published code, where
        sign(0) = 0. By default sign(0) = 1.

    References:
      Bai, Wang and Liberty, ProxQuant: quantized neural networks via proximal operators, ICLR 2019.

    >>> import jax.numpy as jnp
    >>> print(DistanceToSign().prox(jnp.array([1.2, -0.5, 3.0, 0.0]), metric=1.0, strength=0.3))
    [ 1.  -0.8  2.7  0.3]
    """

    keep_zeros: bool = False

    def _sign(self, w: jax.Array) -> jax.Array:
        return jnp.sign(w) if self.keep_zeros else jnp.where(w < 0, -1.0, 1.0).astype(w.dtype)

    def value(self, w: ArrayLike) -> jax.Array:
        w = at_least_float32(w)
        return jnp.sum(jnp.abs(w - self._sign(w)))

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        sign = self._sign(u)
        return sign + soft(u - sign, strength / metric)

    def support(self, w: ArrayLike) -> jax.Array:
        w = jnp.asarray(w)
        return w != self._sign(w)
