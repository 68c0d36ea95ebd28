"""The middle proximal elements: a diagonal metric from the squares of raw gradients."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.proximal.averaging import averaged
from optax_structured.proximal.subproblem import Subproblem, posed_by
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import SecondMoment
from optax_structured.trees.checks import check_fraction, check_nonnegative, check_positive
from optax_structured.trees.precision import at_least_float32, scalar_dtype, wide_dtype
from optax_structured.trees.tree_checks import check_same_tree
from optax_structured.xla.cube_root import cube_root
from optax_structured.xla.leaf_loops import Late


class AdaptivePreconditionerState(NamedTuple):
    """State of `adaptive_preconditioner`."""

    clock: Clock  # steps since init, for schedules; kept by a restart
    eps: jax.Array  # () float32 or wider: that of the last step, for `prox_point`
    square_sum: SecondMoment[Any]  # like params, float32 or wider: U


def adaptive_preconditioner(
    eps: ScalarOrSchedule = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    r"""The cube-root metric of MADGRAD and RAMDA, between `dual_averaging` and `prox_step`.

    With the weights :math:`s_t` of `dual_averaging`, elementwise,

    .. math:: U_t = U_{t-1} + s_t G_t^2, \qquad P_t = \sqrt[3]{U_t} + \epsilon.

    Args:
      eps: :math:`\epsilon \ge 0`, outside the root, in the unit of
        :math:`(\eta\,G^2)^{1/3}`; a number or schedule, 1e-8 to 1e-4. Entries that never received a
        gradient have just this metric. At 0, the cube root of the smallest number bounds it.

    Returns:
      An element that takes and gives subproblems. Its state is `AdaptivePreconditionerState`.

    Without it, the metric is the scalar :math:`\sqrt t` of `dual_averaging`: RMDA.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(
      ...     oxs.dual_averaging(0.001), oxs.adaptive_preconditioner(), oxs.prox_step())
      >>> params = jnp.ones(2)
      >>> updates, _ = optimizer.update(jnp.array([1.0, 8.0]), optimizer.init(params), params)
      >>> print(updates.round(4))  # a first step of (learning rate^2 * gradient)^(1/3)
      [-0.01 -0.02]

    References:
      Defazio and Jelassi, `Adaptivity without Compromise
      <https://arxiv.org/abs/2101.11075>`_, 2022; Huang and Lee,
      `Regularized Adaptive Momentum Dual Averaging
      <https://arxiv.org/abs/2403.14398>`_, 2024.
    """
    check_nonnegative("eps", eps)

    def init(params: Any) -> AdaptivePreconditionerState:
        clock = new_clock()
        floor = jnp.asarray(now(eps, clock), scalar_dtype(params))
        squares = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        return AdaptivePreconditionerState(clock, floor, squares)

    def update(
        updates: Any, state: AdaptivePreconditionerState, params: Any = None, **_: Any
    ) -> tuple[Any, AdaptivePreconditionerState]:
        posed_by(
            "dual_averaging",
            updates,
            "adaptive_preconditioner",
            "sums squares with the weights of dual_averaging, which moving_average does not have: "
            "use adam_preconditioner after it",
        )
        check_same_tree("adaptive_preconditioner", updates, state.square_sum)
        floor = jnp.asarray(now(eps, state.clock), at_least_float32(state.eps).dtype)

        def add_square(sub: Subproblem, u: jax.Array) -> jax.Array:
            total = at_least_float32(u)
            square = jnp.square(sub.gradient.astype(total.dtype))
            return (total + sub.gradient_weight.astype(total.dtype) * square).astype(u.dtype)

        square_sum = jax.tree.map(add_square, updates, state.square_sum)
        new = AdaptivePreconditionerState(
            tick(state.clock), floor.astype(state.eps.dtype), square_sum
        )
        return in_cube_root_metric(updates, square_sum, floor), new

    return optax.GradientTransformationExtraArgs(init, update)


def in_cube_root_metric(subproblems: Any, square_sum: Any, eps: jax.Array) -> Any:
    """The same subproblems in the metric of these sums of squares."""

    def precondition(sub: Subproblem, u: jax.Array) -> Subproblem:
        return dataclasses.replace(sub, metric=Late(_cube_root_metric, (u, eps)))

    return jax.tree.map(precondition, subproblems, square_sum)


def _cube_root_metric(u: jax.Array, eps: jax.Array) -> jax.Array:
    u = at_least_float32(u)
    # No smaller than the root of the smallest number: squares below that are lost from U.
    lowest = float(jnp.finfo(u.dtype).tiny) ** (1 / 3)
    return jnp.maximum(cube_root(u) + eps.astype(u.dtype), lowest)


class AdamPreconditionerState(NamedTuple):
    """State of `adam_preconditioner`."""

    clock: Clock  # steps since init, for schedules; kept by a restart
    total: jax.Array  # () float32 or wider: the average of ones, 1 - b2^t
    mean_square: SecondMoment[Any]  # like params, float32 or wider: v
    max_mean_square: SecondMoment[Any]  # like params under AMSGrad, else None


def adam_preconditioner(
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    amsgrad: bool = False,
    debias: bool = True,
    head_start: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""The square-root metric of Adam, between `moving_average` and `prox_step`.

    .. math:: v_t = b_2 v_{t-1} + (1-b_2) G_t^2, \qquad
        P_t = \sqrt{v_t / (1-b_2^t)} + \epsilon.

    Args:
      b2: decay of the mean square, in [0, 1), or a schedule.
      eps: :math:`\epsilon > 0` outside the root, in the unit of the gradient; a number or schedule.
      amsgrad: take the largest :math:`v` so far, before the correction of bias.
      debias: divide v by :math:`1-b_2^t` (for a schedule, by the average of ones).
      head_start: steps by which t is ahead in that correction. The published code of relaxed
        ProxSGD divides by :math:`1-b_2^{t+1}`: there it is 1.

    Returns:
      An element that takes and gives subproblems. Its state is `AdamPreconditionerState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(
      ...     oxs.moving_average(0.1), oxs.adam_preconditioner(), oxs.prox_step())
      >>> params = jnp.ones(2)
      >>> updates, _ = optimizer.update(jnp.array([1.0, 8.0]), optimizer.init(params), params)
      >>> print(updates.round(3))  # Adam's first step
      [-0.1 -0.1]

    References:
      Yun, Lozano and Yang, `Adaptive Proximal Gradient Methods for Structured Neural Networks
      <https://arxiv.org/abs/2007.07484>`_, 2021.
    """
    check_fraction("b2", b2)
    check_positive("eps", eps)
    if not (isinstance(head_start, int) and head_start >= 0):
        raise ValueError(f"head_start must be a whole number of at least 0, got {head_start!r}")

    def init(params: Any) -> AdamPreconditionerState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        clock = new_clock()
        ahead = jnp.asarray(now(b2, clock), scalar_dtype(params)) ** head_start
        return AdamPreconditionerState(
            clock, 1 - ahead, zeros, jax.tree.map(jnp.zeros_like, zeros) if amsgrad else None
        )

    def update(
        updates: Any, state: AdamPreconditionerState, params: Any = None, **_: Any
    ) -> tuple[Any, AdamPreconditionerState]:
        posed_by(
            "moving_average",
            updates,
            "adam_preconditioner",
            "goes with moving_average; after dual_averaging, whose direction is a sum and not a "
            "mean, use adaptive_preconditioner",
        )
        check_same_tree("adam_preconditioner", updates, state.mean_square)
        dtype = at_least_float32(state.total).dtype
        keep, floor = (jnp.asarray(now(x, state.clock), dtype) for x in (b2, eps))
        total = averaged(state.total, jnp.ones((), dtype), keep)

        def average(sub: Subproblem, v: jax.Array) -> jax.Array:
            return averaged(v, jnp.square(sub.gradient.astype(wide_dtype(v))), keep)

        ones = total if debias else None

        def precondition(sub: Subproblem, v: jax.Array) -> Subproblem:
            return dataclasses.replace(sub, metric=Late(_root_metric, (v, floor, ones)))

        mean_square = jax.tree.map(average, updates, state.mean_square)
        largest = state.max_mean_square
        if amsgrad:
            largest = jax.tree.map(jnp.maximum, largest, mean_square)
        moments = largest if amsgrad else mean_square
        preconditioned = jax.tree.map(precondition, updates, moments)
        return preconditioned, AdamPreconditionerState(
            tick(state.clock), total, mean_square, largest
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _root_metric(v: jax.Array, eps: jax.Array, ones: jax.Array | None) -> jax.Array:
    """The square-root metric; `ones`, what the same average makes of ones, corrects its bias."""
    v = at_least_float32(v)
    unbias = jnp.ones((), v.dtype) if ones is None else jnp.sqrt(ones.astype(v.dtype))
    # No smaller than the root of the smallest number: squares below that are lost from v.
    lowest = float(jnp.finfo(v.dtype).tiny) ** 0.5
    metric = jnp.maximum(jnp.sqrt(v) + eps.astype(v.dtype) * unbias, lowest)
    return metric if ones is None else metric / unbias
