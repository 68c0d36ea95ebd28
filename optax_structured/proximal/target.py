"""A strength that is driven to where a wanted share of the parameters is zero."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from optax_structured.regularizers.base import Regularizer, piece_size
from optax_structured.trees.checks import check_positive


@dataclasses.dataclass(frozen=True)
class TargetSparsity:
    r"""A strength that feedback drives until a wanted share of the parameters is zero.

    Stands where a strength stands. With :math:`z_t` the share of the entries of all regularised
    leaves that lie in zero pieces of their penalty (entries, whole groups, singular values) in the
    prox point of step t,

    .. math:: \lambda_{t+1} = \lambda_t
        \exp\Big( \frac{g}{1 + g t / 10} \, (\text{share} - z_t) \Big)

    so that the strength moves fast at first and settles like 1/t. It lives in the state of
    `prox_step`, goes on through restarts and checkpoints, and can be read there, to be given as a
    plain number to the next run: that is the default, and what to publish.

    Args:
      share: of zeros, in (0, 1).
      start: the first strength, above 0. Begin below the strength that is sought: of a network
        whose layers all died nothing comes back, at any strength.
      gain: g, the largest change of the logarithm in a step, above 0. 0.1 for `ramda` and `rmda`,
        whose point follows the strength at once; 0.01 for `prox_sgd` and `prox_adam` or a plain
        `prox_step`, whose zeros come late and rarely go: they end above the share.

    Raises:
      ValueError: a value out of the ranges above.

    Equals a constant strength of `start` for a gain near 0.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.ramda(0.1, oxs.L1(), oxs.TargetSparsity(0.75, start=1e-2), momentum=0.0)
      >>> target, w = jnp.array([3.0, 1.0, 0.3, 0.1]), jnp.zeros(4)
      >>> state = optimizer.init(w)
      >>> for _ in range(200):
      ...     updates, state = optimizer.update(w - target, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w != 0)
      [ True False False False]

    References:
      Robbins and Monro, A stochastic approximation method, Annals of Mathematical Statistics, 1951,
      for the gain.
    """

    share: float
    start: float = 1e-5
    gain: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share!r}")
        check_positive("start", self.start)
        check_positive("gain", self.gain)

    def next(self, strength: jax.Array, zeros: jax.Array, count: jax.Array) -> jax.Array:
        """The strength of a step, from that of the one before and what it left at zero."""
        gain = self.gain / (1 + 0.1 * self.gain * count.astype(strength.dtype))
        return strength * jnp.exp(gain * (self.share - zeros.astype(strength.dtype)))


def share_of_zeros(points: Iterable[tuple[jax.Array, Regularizer | None]]) -> jax.Array:
    """The share of the entries of penalised leaves that lie in zero pieces of structure."""
    dead, total = jnp.zeros(()), 0
    for w, spec in points:
        if spec is not None and spec.penalizes:
            support, size = spec.support(w), piece_size(spec, w.shape)
            dead += size * jnp.sum(~support, dtype=dead.dtype)
            total += size * support.size
    return dead / max(total, 1)
