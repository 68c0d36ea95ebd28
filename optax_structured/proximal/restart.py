"""Restarts of an optimizer around the current parameters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.proximal.prox_step import ProxStepState
from optax_structured.states.clock import Clock
from optax_structured.step_sizes.stages import check_milestones
from optax_structured.transforms.nonfinite import skip_nonfinite, unguarded
from optax_structured.trees.checks import check_params
from optax_structured.trees.tree_checks import another_tree

_KEPT = (Clock, ProxStepState)  # whose strength may have been sought for
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


class RestartState(NamedTuple):
    """State of `restart_at`."""

    steps: jax.Array  # () int32: steps since init
    inner_state: Any  # fresh at each milestone, but for clocks, strengths, hyperparameters


def restart_at(
    inner: optax.GradientTransformation, milestones: Sequence[int]
) -> optax.GradientTransformationExtraArgs:
    """Restarts `inner` around the current parameters after the given numbers of steps.

    Before the step that follows step m, for each m of `milestones`, the state of `inner` becomes
    `inner.init(params)`: for `ramda` and `rmda` the anchor moves to the current parameters and all
    sums start again. What counts steps for schedules is kept (the clocks of our elements, the
    counters of `optax.scale_by_schedule` and `optax.inject_hyperparams`), so schedules are
    functions of the steps of the whole run. Counters for the correction of bias, as Adam's, start
    again. The switch is a `jnp.where`: no host sync, and nothing to recompile.

    Args:
      inner: any transformation whose `init` may be traced.
      milestones: increasing whole numbers of steps done, each at least 1; may be empty.

    Returns:
      The wrapped transformation; its update needs `params`. Its state is `SkipNonfiniteState`
      around `RestartState`.

    Raises:
      ValueError: milestones that do not increase from 1 on; missing `params`.

    Equals `inner` before the first milestone, and always if there is none.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.restart_at(oxs.ramda(0.01), milestones=(200, 400))
      >>> state = optimizer.init(jnp.ones(3))

    References:
      Huang and Lee, `Regularized Adaptive Momentum Dual Averaging
      <https://arxiv.org/abs/2403.14398>`_, 2024. Momentum is not reset there either.
    """
    milestones = check_milestones(milestones)
    inner = unguarded(inner)  # the whole is guarded

    def init(params: Any) -> RestartState:
        return RestartState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Any, state: RestartState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RestartState]:
        check_params("restart_at", params)
        inner_state = state.inner_state
        if milestones:
            due = jnp.any(state.steps == jnp.asarray(milestones, jnp.int32))
            fresh = inner.init(params)
            structures: list[Any] = [jax.tree.structure(s) for s in (fresh, inner_state)]
            if structures[0] != structures[1]:
                raise another_tree("restart_at", ["its state has other leaves"])
            fresh = _keep_clocks(inner_state, fresh)
            inner_state = jax.tree.map(
                lambda f, s: jnp.where(due, f.astype(s.dtype), s), fresh, inner_state
            )
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        return updates, RestartState(optax.safe_increment(state.steps), inner_state)

    return skip_nonfinite(optax.GradientTransformationExtraArgs(init, update))


def _keep_clocks(old: Any, fresh: Any) -> Any:
    """`fresh` with the clocks, strengths and injected hyperparameters of `old`."""

    def keep(old: Any, fresh: Any) -> Any:
        if isinstance(old, _KEPT):
            return old
        if isinstance(old, _INJECTED):
            return old._replace(inner_state=_keep_clocks(old.inner_state, fresh.inner_state))
        return fresh

    return jax.tree.map(keep, old, fresh, is_leaf=lambda x: isinstance(x, (*_KEPT, *_INJECTED)))
