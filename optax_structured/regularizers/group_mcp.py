"""The minimax concave penalty on the norms of groups, globally minimised in any metric."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import promote
from optax_structured.regularizers.groups import Grouped
from optax_structured.trees.checks import check_positive

_NEWTON_STEPS = 12


@dataclasses.dataclass(frozen=True)
class GroupMCP(Grouped):
    r"""Group lasso that levels off: large groups are not shrunk at all.

    With :math:`R = \gamma L \omega` for the threshold L,

    .. math:: \psi(w) = \sum_g \begin{cases}
            L\omega\|w_g\| - \|w_g\|^2/(2\gamma) & \|w_g\| \le R \\
            \gamma (L\omega)^2/2 & \text{else} \end{cases}

    The minimiser of a group is 0, or `u` (if :math:`\|u_g\| > R`), or, with
    :math:`\kappa = \tau/\gamma`,

    .. math:: w = \frac{\rho\, m u}{\rho m + (1-\rho)\kappa}, \qquad
        \|w_g\| = \rho R, \quad 0 < \rho < 1

    where a metric above :math:`\kappa` makes the subproblem convex: then a group is zero iff
    :math:`\|m_g u_g\| \le \tau L\omega`. Below, there are two valleys; they are compared, and the
    one nearer to zero is preferred on a tie. `gamma` to infinity with `threshold=1` equals
    `GroupLasso`; groups of one entry with weight 1 equal `MCP`.

    Args:
      group_axis: as in `GroupLasso`.
      threshold: L, in units of the slope of psi at zero, above 0. The published penalty of
        parameter lambda has `threshold=lambda`; the strength (there, the learning rate) multiplies
        it as a whole.
      gamma: psi is constant beyond `gamma * threshold * weight`; above 0; published runs use 1e3.
      batch_axis: as in `GroupLasso`.
      weight: :math:`\omega`, multiplies the threshold; above 0; default the square root of the
        group size.

    Raises:
      TypeError: axes that are not ints.
      ValueError: a threshold, gamma or weight that is not above 0; from `check`, a leaf without
        these axes or with none left inside the group.

    References:
      Deleu and Bengio, Structured sparsity inducing adaptive optimizers for deep learning, 2021:
      their Newton iteration is right for a metric above kappa only.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.array([[6.0, 8.0], [0.6, 0.8], [1.2, 1.6]])
    >>> penalty = GroupMCP(group_axis=0, threshold=1.0, gamma=3.0, weight=1.0)
    >>> print(penalty.prox(kernel, metric=1.0, strength=1.0))
    [[6.         8.        ]
     [0.         0.        ]
     [0.90000004 1.2       ]]
    """

    threshold: float = 1.0
    gamma: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("threshold", self.threshold)
        check_positive("gamma", self.gamma)

    def value(self, w: ArrayLike) -> jax.Array:
        slope = self.threshold * self.group_weight(jnp.shape(w))
        norms = jnp.minimum(self.norms(w), self.gamma * slope)
        return jnp.sum(slope * norms - jnp.square(norms) / (2 * self.gamma))

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, strength = promote(u, metric, strength)
        axes = self.coupled_axes(u.ndim)
        radius = self.gamma * self.threshold * self.group_weight(u.shape)
        # The answer depends on the metric and the strength through their ratio only.
        largest = jnp.max(jnp.broadcast_to(metric, u.shape), axis=axes, keepdims=True, initial=0.0)
        largest = jnp.where(largest == 0.0, 1.0, largest)  # groups without entries
        return _minimise(u, radius, metric / largest, strength / (self.gamma * largest), axes)


def _minimise(
    u: jax.Array, radius: float, metric: jax.Array, kappa: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    r"""The minimiser per group, from the root :math:`\rho` of N = 1 that is nearest to zero.

    .. math:: N(\rho) = \|v / D\|, \quad v = m u / R, \quad D = \rho m + (1-\rho)\kappa

    1/N is concave in :math:`\rho` even where the metric is below :math:`\kappa`, so that Newton's
    iteration on it rises to the first root from the tangent at 0, without safeguard.
    """

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=axes, keepdims=True)

    v = metric * u / radius
    square = total(jnp.square(v))
    live = ~(square <= jnp.square(kappa))  # NaN lives, and shows
    norm = jnp.sqrt(jnp.where(live, square, 1.0))

    def advance(rho: jax.Array, excess: jax.Array, slope: jax.Array) -> jax.Array:
        # Without a slope upwards there is no root before 1, where w = u.
        rises = slope > 0
        return jnp.where(rises, jnp.minimum(rho + excess / jnp.where(rises, slope, 1.0), 1.0), 1.0)

    def newton(_: int, rho: jax.Array) -> jax.Array:
        d = rho * metric + (1 - rho) * kappa
        p = v / d
        n = jnp.sqrt(jnp.where(live, total(jnp.square(p)), 1.0))
        return advance(rho, n - 1, total(jnp.square(p / n) * (metric - kappa) / d))

    # The tangent at 0, free of divisions by kappa, which may be 0. Dead groups are put at 1.
    slope = jnp.where(live, total(jnp.square(v / norm) * (metric - kappa)), 0.0)
    start = advance(jnp.zeros_like(norm), norm - kappa, slope)
    rho = jax.lax.fori_loop(0, _NEWTON_STEPS - 1, newton, start)
    # At the root one step carries the whole derivative (implicit function theorem).
    rho = jnp.where(live, newton(0, jax.lax.stop_gradient(rho)), 0.0)
    d = rho * metric + (1 - rho) * kappa
    d = jnp.where(d == 0.0, 1.0, d)  # dead at strength 0: u is zero there
    w = jnp.where(live, rho * metric / d * u, 0.0)
    # Beyond the ball u itself is stationary: is it lower?
    outside = total(jnp.square(u / radius)) > 1
    lower = total(jnp.square(u / radius) * (metric / d) * (kappa / d)) > 1
    return jnp.where(outside & (lower | (rho == 1.0)), u, w)
