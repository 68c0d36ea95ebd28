"""The first proximal elements: from gradients to a direction and a centre."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.proximal.subproblem import Subproblem
from optax_structured.states.clock import (
    Clock,
    ScalarOrSchedule,
    new_clock,
    now,
    root_of_count,
    tick,
)
from optax_structured.states.roles import FirstMoment, GradientSum, Point
from optax_structured.transforms.adam import average
from optax_structured.trees.checks import check_fraction, check_nonnegative, check_params
from optax_structured.trees.precision import at_least_float32, scalar_dtype, wide_dtype
from optax_structured.trees.tree_checks import check_real, check_same_tree
from optax_structured.xla.leaf_loops import Late


class DualAveragingState(NamedTuple):
    """State of `dual_averaging`."""

    clock: Clock  # steps since init, for schedules; kept by a restart
    steps: jax.Array  # () int32: t, steps since the last restart
    alpha: jax.Array  # () float32 or wider: the sum of all s
    anchor: Point[Any]  # like params, float32 or wider: W0, changes at a restart only
    gradient_sum: GradientSum[Any]  # like params, float32 or wider: V


def dual_averaging(learning_rate: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Weighted sum of all gradients around the point where training started.

    With :math:`t` the number of steps and :math:`s_t = \eta\sqrt t`,

    .. math::
        \alpha_t = \alpha_{t-1} + s_t, \qquad V_t = V_{t-1} + s_t G_t,

    each leaf of the updates becomes the subproblem :math:`\langle V_t, w\rangle +
    \tfrac{\sqrt t}{2}\|w - W_0\|^2 + \alpha_t\lambda\psi(w)`, for `adaptive_preconditioner` to
    give another metric than :math:`\sqrt t`, and for `prox_step` to solve.

    Args:
      learning_rate: :math:`\eta`, a number or schedule, 1e-3 to 5e-2 under
        `adaptive_preconditioner`, 0.1 to 25 without. Keep it constant between restarts: the theory
        of identification needs it.

    Returns:
      The first element of a proximal chain. Its state is `DualAveragingState`.

    Equals, followed by `prox_step` without regularizer, modernized dual averaging:
    :math:`W_t = W_0 - \eta t^{-1/2}\sum_k \sqrt k\, G_k`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(oxs.dual_averaging(0.1), oxs.prox_step(oxs.L1(), 0.5))
      >>> params = jnp.array([1.0, 0.01])
      >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(3))
      [ 0.85 -0.04]

    References:
      Huang and Lee, `Training Structured Neural Networks Through Manifold Identification and
      Variance Reduction <https://arxiv.org/abs/2112.02612>`_, 2022.
    """
    check_nonnegative("learning_rate", learning_rate)

    def init(params: Any) -> DualAveragingState:
        check_real("dual_averaging", params)
        return DualAveragingState(
            clock=new_clock(),
            steps=jnp.zeros((), jnp.int32),
            alpha=jnp.zeros((), scalar_dtype(params)),
            # A copy: sharing the buffer of params would make their donation fail.
            anchor=jax.tree.map(lambda p: jnp.array(at_least_float32(p), copy=True), params),
            gradient_sum=jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params),
        )

    def update(
        updates: Any, state: DualAveragingState, params: Any = None, **_: Any
    ) -> tuple[Any, DualAveragingState]:
        check_same_tree("dual_averaging", updates, state.gradient_sum)
        steps = optax.safe_increment(state.steps)
        alpha = at_least_float32(state.alpha)
        share = now(learning_rate, state.clock) * root_of_count(steps, alpha.dtype)
        share = jnp.asarray(share, alpha.dtype)

        def add(v: jax.Array, g: jax.Array) -> jax.Array:
            total = at_least_float32(v)
            return (total + share.astype(total.dtype) * jnp.asarray(g, total.dtype)).astype(v.dtype)

        alpha = (alpha + share).astype(state.alpha.dtype)
        sums = jax.tree.map(add, state.gradient_sum, updates)
        new = DualAveragingState(tick(state.clock), steps, alpha, state.anchor, sums)
        return averaged_subproblems(new, updates, share), new

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_subproblems(
    state: DualAveragingState, gradients: Any, share: jax.Array | None = None
) -> Any:
    """The subproblem that the sums in a state pose for each leaf, in the metric sqrt(t)."""
    alpha = at_least_float32(state.alpha)
    root = root_of_count(jnp.maximum(state.steps, 1), alpha.dtype)

    def pose(g: Any, v: jax.Array, anchor: jax.Array) -> Subproblem:
        v, centre = at_least_float32(v), at_least_float32(anchor)
        return Subproblem(
            v, root.astype(v.dtype), centre, alpha, jnp.asarray(g), share, "dual_averaging"
        )

    return jax.tree.map(pose, gradients, state.gradient_sum, state.anchor)


class MovingAverageState(NamedTuple):
    """State of `moving_average`."""

    clock: Clock  # steps since init, for schedules; kept by a restart
    total: jax.Array  # () float32 or wider: the average of ones, 1 - decay^t
    mean: FirstMoment[Any]  # like params, float32 or wider: m


def moving_average(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    *,
    debias: bool = True,
    weight: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Moving average of gradients around the current, decayed, parameters.

    .. math:: m_t = \beta m_{t-1} + (1-\beta) G_t

    Each leaf of the updates becomes the subproblem :math:`\langle \eta\hat m_t, w\rangle +
    \tfrac12\|w - (1-\gamma d) W_{t-1}\|^2 + \gamma\lambda\psi(w)` with weight :math:`\gamma` and
    weight decay :math:`d`: decay comes before the step, so it moves the centre of the prox.

    Args:
      learning_rate: :math:`\eta`, a number or schedule.
      decay: :math:`\beta` in [0, 1), or a schedule.
      debias: divide m by :math:`1-\beta^t` (for a schedule, by the average of ones).
      weight: :math:`\gamma`, a number or schedule; by default the learning rate.
      weight_decay: d, decoupled, a number or schedule; 0 to 0.1.

    Returns:
      The first element of a proximal chain; its update needs `params`. Its state is
      `MovingAverageState`.

    Equals, followed by `prox_step` without regularizer and without debias, `optax.sgd` on the
    moving average of the gradients.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(oxs.moving_average(0.1), oxs.prox_step(oxs.L1(), 0.5))
      >>> params = jnp.array([1.0, 0.01])
      >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(3))
      [ 0.85 -0.04]

    References:
      Yun, Lozano and Yang, `Adaptive Proximal Gradient Methods for Structured Neural Networks
      <https://arxiv.org/abs/2007.07484>`_, 2021.
    """
    check_nonnegative("learning_rate", learning_rate)
    check_fraction("decay", decay)
    check_nonnegative("weight_decay", weight_decay)
    if weight is not None:
        check_nonnegative("weight", weight)

    def init(params: Any) -> MovingAverageState:
        check_real("moving_average", params)
        return MovingAverageState(
            clock=new_clock(),
            total=jnp.zeros((), scalar_dtype(params)),
            mean=jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params),
        )

    def update(
        updates: Any, state: MovingAverageState, params: Any = None, **_: Any
    ) -> tuple[Any, MovingAverageState]:
        check_params("moving_average", params)
        check_same_tree("moving_average", updates, state.mean)
        check_same_tree("moving_average", params, updates, whose="the gradients")
        dtype = at_least_float32(state.total).dtype
        rate, keep = (jnp.asarray(now(x, state.clock), dtype) for x in (learning_rate, decay))
        gamma = rate if weight is None else jnp.asarray(now(weight, state.clock), dtype)
        shrink = 1 - gamma * jnp.asarray(now(weight_decay, state.clock), dtype)
        total = averaged(state.total, jnp.ones((), dtype), keep)
        step = rate / total.astype(dtype) if debias else rate

        def pose(g: Any, m: jax.Array, p: Any) -> Subproblem:
            dtype = wide_dtype(m)
            direction = Late(_scaled, (jnp.asarray(m, dtype), step))
            centre = Late(_scaled, (jnp.asarray(p, dtype), shrink))
            return Subproblem(
                direction,
                jnp.ones((), dtype),
                centre,
                weight=gamma,
                gradient=jnp.asarray(g),
                gradient_weight=1 - keep,
                origin="moving_average",
                start=centre,
            )

        mean = jax.tree.map(lambda m, g: averaged(m, g, keep), state.mean, updates)
        subproblems = jax.tree.map(pose, updates, mean, params)
        return subproblems, MovingAverageState(tick(state.clock), total, mean)

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    return factor.astype(x.dtype) * x


def averaged(mean: jax.Array, new: Any, keep: jax.Array) -> jax.Array:
    """One step of a moving average, kept in the dtype of `mean` and computed in float32 at least.

    In bfloat16 a share of 0.999 would be 1, and the average would stand still.
    """
    return average(mean, jnp.asarray(new, wide_dtype(mean)), keep).astype(mean.dtype)
