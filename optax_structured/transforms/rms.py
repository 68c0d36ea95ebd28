"""RMSProp's direction, of the mean square or of the variance."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structured.trees.checks import check_fraction, check_nonnegative


def uncorrected_rms(
    decay: Any = 0.9, eps: Any = 1e-6, momentum: Any = None, *, centered: bool = False
) -> optax.GradientTransformation:
    r"""RMSProp's direction, with eps outside the root, followed by heavy-ball momentum.

    .. math:: V_t = b V_{t-1} + (1-b) G_t^2, \quad
        N_t = \mu N_{t-1} + G_t / (\sqrt{V_t} + \epsilon)

    Args:
      decay: b in [0, 1).
      eps: added to the root, above 0, in the unit of the gradient.
      momentum: :math:`\mu` in [0, 1); None, which is 0, keeps no buffer.
      centered: divide by the standard deviation, of :math:`V_t - A_t^2` with
        :math:`A_t = b A_{t-1} + (1-b) G_t`: one more moment. A gradient that does not change has
        none, and takes steps of :math:`G/\epsilon`.

    Returns:
      A chain of `optax.scale_by_rms` and `optax.trace`; centered, with the state of
      `optax.scale_by_stddev` in front.

    Equals torch's RMSProp. The moments are initialised at zero, so the first steps are
    :math:`(1-b^t)^{-1/2}` times longer than later ones.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> rms = oxs.transforms.uncorrected_rms(decay=0.75)
      >>> updates, _ = rms.update(jnp.array([2.0, -3.0]), rms.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [ 2. -2.]
    """
    check_fraction("decay", decay)
    check_nonnegative("eps", eps)
    plain = optax.scale_by_rms(decay, eps, eps_in_sqrt=False)
    rms = _by_deviation(decay, eps) if centered else plain
    if momentum is None:
        return rms
    check_fraction("momentum", momentum)
    return optax.chain(rms, optax.trace(momentum))


def _by_deviation(decay: Any, eps: Any) -> optax.GradientTransformation:
    """As `optax.scale_by_stddev`, without NaN where rounding makes a variance negative."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(updates, state.mu, decay, 1)
        nu = optax.tree.update_moment(updates, state.nu, decay, 2)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return g / (jnp.sqrt(jnp.maximum(v - jnp.square(m), 0)) + eps)

        return jax.tree.map(direction, updates, mu, nu), state._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_stddev(decay).init, update)
