"""AdaGrad-Norm: one learning rate for all parameters, from the sum of squared gradient norms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import Factor
from optax_structured.trees.checks import check_nonnegative, check_positive
from optax_structured.trees.precision import as_updates, at_least_float32, scalar_dtype
from optax_structured.trees.tree_checks import check_real, check_same_tree


class AdagradNormState(NamedTuple):
    """State of `scale_by_adagrad_norm`."""

    clock: Clock  # steps since init, for schedules
    total: Factor[jax.Array]  # () float32 or wider: squared gradient norms so far, and the start


def scale_by_adagrad_norm(
    initial_accumulator: float = 1e-2, eps: ScalarOrSchedule = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the root of the sum of their squared norms.

    .. math:: s_t = s_{t-1} + \|G_t\|^2, \qquad U_t = G_t / (\sqrt{s_t} + \epsilon)

    Args:
      initial_accumulator: :math:`s_0` above 0, in the unit of the squared gradient.
      eps: added to the root, at least 0, a number or schedule.

    Returns:
      An element that needs no `params`. Its state is `AdagradNormState`, one number.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.scale_by_rss` for a single scalar parameter and an eps of 0.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> element = oxs.step_sizes.scale_by_adagrad_norm(initial_accumulator=11.0)
      >>> gradient = jnp.array([3.0, 4.0])
      >>> updates, _ = element.update(gradient, element.init(jnp.zeros(2)))
      >>> print(updates)
      [0.5       0.6666667]

    References:
      Lau, Liu and Kolar, `AdAdaGrad <https://arxiv.org/abs/2402.11215>`_, 2024. The code of that
      name sums per output row, and into biases also the row of the weight before them.
    """
    check_positive("initial_accumulator", initial_accumulator)
    check_nonnegative("eps", eps)

    def init(params: Any) -> AdagradNormState:
        check_real("scale_by_adagrad_norm", params)
        start = jnp.full((), initial_accumulator, scalar_dtype(params))
        return AdagradNormState(new_clock(), start)

    def update(
        updates: Any, state: AdagradNormState, params: Any = None, **_: Any
    ) -> tuple[Any, AdagradNormState]:
        if params is not None:
            check_same_tree("scale_by_adagrad_norm", updates, params, whose="the parameters")
        dtype = at_least_float32(state.total).dtype
        wide = jax.tree.map(at_least_float32, updates)
        total = at_least_float32(state.total)
        for g in jax.tree.leaves(wide):
            total += jnp.sum(g * g).astype(dtype)
        # One step that is not finite does not stop all later ones.
        kept = jnp.where(jnp.isfinite(total), total, at_least_float32(state.total))
        root = jnp.sqrt(total) + jnp.asarray(now(eps, state.clock), dtype)
        scaled = jax.tree.map(lambda g: g / root.astype(g.dtype), wide)
        new = AdagradNormState(tick(state.clock), kept.astype(state.total.dtype))
        return as_updates(scaled, updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)
