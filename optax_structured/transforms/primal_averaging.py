"""Momentum as an average of iterates, at which gradients are taken."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import Point
from optax_structured.trees.checks import check_fraction, check_params
from optax_structured.trees.precision import at_least_float32, common_dtype
from optax_structured.trees.tree_checks import check_same_tree


class PrimalAveragingState(NamedTuple):
    """State of `primal_averaging`."""

    clock: Clock  # steps since init, for schedules
    iterate: Point[Any]  # like params, float32 or wider: z
    inner: Any  # of the inner transformation


def primal_averaging(
    inner: optax.GradientTransformation, momentum: ScalarOrSchedule = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Steps an iterate of its own, of which the parameters are a moving average.

    With :math:`u_t` the update of `inner` for the gradient at :math:`W_{t-1}`, and
    :math:`c = 1 - momentum`,

    .. math:: z_t = z_{t-1} + u_t, \qquad W_t = (1 - c) W_{t-1} + c\, z_t, \qquad z_0 = W_0

    Args:
      inner: any optimizer; as `params` it sees z.
      momentum: share of the previous parameters that is kept, in [0, 1), a number or schedule.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain. Its
      state is `PrimalAveragingState`, one more copy of the parameters.

    Raises:
      ValueError: a momentum outside [0, 1); missing `params`; another tree than that of `init`.

    Equals `inner` for a momentum of 0, and around `optax.sgd(rate)` heavy-ball momentum,
    `optax.sgd(c * rate, momentum)`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.transforms.primal_averaging(optax.sgd(1.0), momentum=0.75)
      >>> params = jnp.array([2.0])
      >>> updates, _ = optimizer.update(jnp.array([1.0]), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [1.75]

    References:
      Defazio, `Momentum via Primal Averaging <https://arxiv.org/abs/2010.00406>`_, 2020.
    """
    check_fraction("momentum", momentum)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PrimalAveragingState:
        # A copy: sharing the buffer of params would make their donation fail.
        iterate = jax.tree.map(lambda p: jnp.array(at_least_float32(p), copy=True), params)
        return PrimalAveragingState(new_clock(), iterate, inner.init(iterate))

    def update(
        updates: Any, state: PrimalAveragingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PrimalAveragingState]:
        check_params("primal_averaging", params)
        check_same_tree("primal_averaging", params, state.iterate)
        gradients, share = updates, 1 - jnp.asarray(now(momentum, state.clock), float)
        updates, inner_state = inner.update(updates, state.inner, state.iterate, **extra_args)
        iterate = optax.apply_updates(state.iterate, updates)

        def towards(g: Any, z: jax.Array, p: Any) -> jax.Array:
            step = at_least_float32(z)
            step = share.astype(step.dtype) * (step - jnp.asarray(p, step.dtype))
            return step.astype(common_dtype(g, p))

        moves = jax.tree.map(towards, gradients, iterate, params)
        return moves, PrimalAveragingState(tick(state.clock), iterate, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
