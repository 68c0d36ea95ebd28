"""STORM: a moving average of gradients, corrected for the way between the points they are from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import Estimate
from optax_structured.trees.checks import check_share
from optax_structured.trees.paths import is_hole
from optax_structured.trees.precision import as_updates, at_least_float32
from optax_structured.trees.tree_checks import check_real, check_same_tree


class StormState(NamedTuple):
    """State of `storm`."""

    clock: Clock  # steps since init, for schedules
    steps: jax.Array  # () int32: gradients in the estimate, 0 before the first
    estimate: Estimate[Any]  # like params, float32 or wider: z


def storm(beta: ScalarOrSchedule = 0.1) -> optax.GradientTransformationExtraArgs:
    r"""Gradient estimate that carries the last one over to the new point before it averages.

    With the gradients :math:`G_t = \nabla f(w_t; \xi_t)` and
    :math:`G_t^- = \nabla f(w_{t-1}; \xi_t)` of the same batch at the current and at the previous
    parameters,

    .. math:: z_t = (1-\beta)(z_{t-1} - G_t^-) + G_t, \qquad z_1 = G_1.

    Momentum averages gradients of different points and is biased by the way between them; here
    the difference of two gradients of one batch makes up for the way, so that the variance of z
    falls as the steps become short.

    Args:
      beta: :math:`\beta` in [0, 1], a number or schedule: the share of the estimate that a new
        gradient replaces; 0.01 to 0.5. Without noise any value gives the gradient itself.

    Returns:
      An element whose update takes `grads_prev=`, a tree like the gradients. The first step does
      not use it: any finite gradients will do, such as the current ones. Its state is
      `StormState`.

    Raises:
      ValueError: a beta outside [0, 1]; an update without `grads_prev`.

    Equals `optax.identity` for `beta=1`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structured as oxs
      >>> loss = lambda w, batch: jnp.sum((w - batch) ** 2)
      >>> optimizer = optax.chain(oxs.transforms.storm(beta=0.5), optax.sgd(0.1))
      >>> params = previous = jnp.zeros(1)
      >>> state = optimizer.init(params)
      >>> for batch in (1.0, 3.0, 2.0):
      ...     grads = jax.grad(loss)(params, batch)
      ...     grads_prev = jax.grad(loss)(previous, batch)
      ...     updates, state = optimizer.update(grads, state, params, grads_prev=grads_prev)
      ...     previous, params = params, optax.apply_updates(params, updates)
      >>> print(f"{params[0]:.3f}")
      0.848

    References:
      Cutkosky and Orabona, `Momentum-Based Variance Reduction in Non-Convex SGD
      <https://arxiv.org/abs/1905.10018>`_, 2019.
    """
    check_share("beta", beta)

    def init(params: Any) -> StormState:
        check_real("storm", params, splits=False)
        return StormState(
            clock=new_clock(),
            steps=jnp.zeros((), jnp.int32),
            estimate=jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params),
        )

    def update(
        updates: Any,
        state: StormState,
        params: Any = None,
        *,
        grads_prev: Any = None,
        **_: Any,
    ) -> tuple[Any, StormState]:
        if grads_prev is None:
            raise ValueError(
                "storm needs the gradient of this batch at the previous parameters too: call "
                "update(grads, state, params, grads_prev=jax.grad(loss)(previous, batch))"
            )
        check_same_tree("storm", updates, state.estimate)
        # No estimate yet: the whole of it is replaced.
        share = jnp.where(state.steps == 0, 1.0, now(beta, state.clock))

        def move(new: Any, z: Any, old: Any) -> Any:
            return z if is_hole(new) else corrected_average(z, new, old, share, 1 - share)

        # `optax.masked` and `optax.partition` cut holes into updates, not into grads_prev.
        estimate = jax.tree.map(move, updates, state.estimate, grads_prev, is_leaf=is_hole)
        steps = optax.safe_increment(state.steps)
        updates = as_updates(estimate, updates, params)
        return updates, StormState(tick(state.clock), steps, estimate)

    return optax.GradientTransformationExtraArgs(init, update)


def corrected_average(
    estimate: jax.Array, new: jax.Array, old: jax.Array, share: Any, correction: Any
) -> jax.Array:
    r"""Moving average, plus a multiple of what the same samples say has changed since.

    .. math:: (1-a) z + a\,G + \gamma\,(G - G^-)

    Args:
      estimate: z, float32 or wider.
      new: G, samples at the current point.
      old: :math:`G^-`, the same samples at the previous point.
      share: a in [0, 1].
      correction: :math:`\gamma`; 1 - a is `storm`.

    Returns:
      An array like `estimate`.

    >>> print(corrected_average(jnp.ones(()), jnp.array(4.0), jnp.array(3.0), 0.5, 0.5))
    3.0
    """
    new, old, share, correction = (
        jnp.asarray(x, estimate.dtype) for x in (new, old, share, correction)
    )
    return (1 - share) * estimate + share * new + correction * (new - old)
