"""Particle gradient flow: wide networks as measures, with dynamics that do not depend on width."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.trees.checks import check_nonnegative


class Particles(NamedTuple):
    """The units of a two-layer network, or spikes: `(1/m) sum_i weight_i feature(position_i)`."""

    weight: jax.Array  # (m, ...)
    position: jax.Array  # (m, ...)


class ParticleFlowState(NamedTuple):
    """State of `particle_gradient_flow`."""

    clock: Clock  # steps since init, for schedules


def particle_gradient_flow(
    learning_rate: ScalarOrSchedule, strength: ScalarOrSchedule = 0.0
) -> optax.GradientTransformation:
    r"""Descent on m particles of weight 1/m each, at a rate of m times the learning rate.

    .. math:: F(u) = R\Big(\frac1m \sum_i \Phi(u_i)\Big) + \frac1m \sum_i V(u_i), \qquad
        u \leftarrow \operatorname{prox}_{\eta V}\big(u - \eta\, m\, \nabla R\big),
        \qquad V(a, w) = \lambda |a| \|w\|

    The gradient of each particle is of size 1/m. The factor m makes up for it, and trajectories of
    the prediction then tend to one limit for many particles, a gradient flow of their measure;
    without it wide networks stand still.

    Args:
      learning_rate: :math:`\eta`, 0.05 to 1, in units of the limit.
      strength: :math:`\lambda`, such that learning_rate * strength < 1. Total variation of the
        measure, for positively homogeneous features; particles end at exactly 0.0.

    Returns:
      An optax optimizer of `Particles`, by gradients of R alone. Start from directions uniform on
      the sphere and half of the signs positive. Its state is `ParticleFlowState`.

    Raises:
      ValueError: parameters that are not `Particles`; a strength as large as that.

    Equals `optax.sgd(m * learning_rate)` for `strength=0`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> start = Particles(jnp.ones(4), jnp.ones((4, 2)))
      >>> optimizer = particle_gradient_flow(0.5)
      >>> slope = jax.grad(lambda p: jnp.mean(p.weight))(start)
      >>> updates, _ = optimizer.update(slope, optimizer.init(start), start)
      >>> print(updates.weight)
      [-0.5 -0.5 -0.5 -0.5]

    References:
      Chizat and Bach, `On the Global Convergence of Gradient Descent for Over-parameterized Models
      using Optimal Transport <https://arxiv.org/abs/1805.09545>`_, 2018.
    """
    check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("strength", strength)
    both_fixed = not callable(learning_rate) and not callable(strength)
    if both_fixed and not isinstance(learning_rate * strength, jax.core.Tracer):
        _check_convex(learning_rate * strength)

    def init(params: Any) -> ParticleFlowState:
        if not isinstance(params, Particles):
            raise ValueError(
                f"particle_gradient_flow moves Particles(weight, position), got {type(params)}"
            )
        return ParticleFlowState(new_clock())

    def update(updates: Particles, state: ParticleFlowState, params: Any = None) -> Any:
        if params is None:
            raise ValueError(
                "particle_gradient_flow needs the parameters: update(g, state, params)"
            )
        rate, weight = now(learning_rate, state.clock), now(strength, state.clock)
        scale = rate * len(params.weight)
        moved = Particles(*(p - scale * g for p, g in zip(params, updates, strict=True)))
        moved = prox_product_of_norms(moved, rate * weight)
        change = jax.tree.map(lambda new, p, g: (new - p).astype(g.dtype), moved, params, updates)
        return change, ParticleFlowState(tick(state.clock))

    return optax.GradientTransformation(init, update)


def prox_product_of_norms(particles: Particles, strength: Any) -> Particles:
    r"""Proximal step of :math:`\tau \sum_i |a_i| \|w_i\|`, in closed form.

    Directions stay, and the two norms solve a convex problem in two variables: where neither is
    zero, :math:`\alpha = (|a| - \tau\|w\|) / (1 - \tau^2)` and :math:`\beta` likewise; where one
    would be negative it is 0, and the other is as it was.

    Args:
      particles: `Particles`, weights (m, ...) and positions (m, ...).
      strength: :math:`\tau` in [0, 1).

    Returns:
      `Particles`.

    Example:
      >>> import jax.numpy as jnp
      >>> moved = prox_product_of_norms(Particles(jnp.array([2.0, 0.1]), jnp.ones((2, 1))), 0.5)
      >>> print(moved.weight, moved.position[:, 0])
      [2. 0.] [0. 1.]
    """
    _check_convex(strength)
    a, b = (_norms(x) for x in particles)
    inside = 1 - strength**2
    alpha = jnp.where(b <= strength * a, a, jnp.maximum(a - strength * b, 0) / inside)
    beta = jnp.where(a <= strength * b, b, jnp.maximum(b - strength * a, 0) / inside)

    def scaled(x: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        ratio = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 0)
        return x * ratio.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)

    return Particles(scaled(particles.weight, a, alpha), scaled(particles.position, b, beta))


def _norms(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)


def _check_convex(strength: Any) -> None:
    if not isinstance(strength, jax.core.Tracer) and not 0 <= strength < 1:
        raise ValueError(
            f"learning_rate * strength must be in [0, 1), got {strength}: at 1 the proximal step "
            "has no unique solution"
        )
