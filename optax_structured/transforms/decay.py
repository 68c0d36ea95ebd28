"""Weight decay of the weights after the step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, is_zero, new_clock, now, tick
from optax_structured.trees.checks import check_nonnegative, check_params
from optax_structured.trees.precision import as_update, at_least_float32


class DecayState(NamedTuple):
    """State of `decay_updated_weights`."""

    clock: Clock  # steps since init, for schedules


def decay_updated_weights(
    learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled weight decay of the updated weights: the last element of a chain.

    .. math:: U_t \leftarrow (1 - \eta d)(W_{t-1} + U_t) - W_{t-1}

    Args:
      learning_rate: :math:`\eta`, a number or schedule: that of the step before.
      weight_decay: d, a number or schedule; 0 to 0.1.

    Returns:
      An element that needs `params` (not for a plain 0, which does nothing) and comes after the
      learning rate. Its state is `DecayState`.

    Raises:
      ValueError: a negative number, or missing `params`.

    Equals `optax.add_decayed_weights` before the learning rate up to :math:`\eta d\, U_t`, and
    `optax.identity` for a `weight_decay` of 0. Published low-rank codes decay in this order.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(optax.sgd(0.5), oxs.transforms.decay_updated_weights(0.5, 0.5))
      >>> params = jnp.array([2.0])
      >>> updates, _ = optimizer.update(jnp.array([2.0]), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0.75]
    """
    check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("weight_decay", weight_decay)

    def init(params: Any) -> DecayState:
        return DecayState(new_clock())

    def update(
        updates: Any, state: DecayState, params: Any = None, **_: Any
    ) -> tuple[Any, DecayState]:
        new = DecayState(tick(state.clock))
        if is_zero(weight_decay):
            return updates, new
        check_params("decay_updated_weights", params)
        share = now(learning_rate, state.clock) * now(weight_decay, state.clock)

        def decay(u: Any, p: Any) -> jax.Array:
            weight = at_least_float32(p)
            wide = jnp.asarray(u, weight.dtype)
            return as_update(wide - jnp.asarray(share, wide.dtype) * (weight + wide), u, p)

        return jax.tree.map(decay, updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)
