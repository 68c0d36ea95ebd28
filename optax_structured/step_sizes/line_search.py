"""PoNoS: a stochastic line search that starts from Polyak's step and remembers its backtracks."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.step_sizes.backtracking import Search, backtrack, bound
from optax_structured.step_sizes.polyak import polyak_initial_step, zhang_hager_reference
from optax_structured.trees.checks import (
    check_nonnegative,
    check_params,
    check_positive,
    check_share,
)
from optax_structured.trees.precision import as_updates, at_least_float32, scalar_dtype
from optax_structured.trees.products import dot, norm
from optax_structured.trees.tree_checks import check_real, check_same_tree

# The gradient below which the published code stays.
_FLAT = 1e-8


class PonosState(NamedTuple):
    """State of `scale_by_ponos`."""

    clock: Clock  # steps since init, for schedules
    learning_rate: jax.Array  # () float32 or wider: the last accepted step, 0 where there was none
    memory: jax.Array  # () int32: the next search starts so many backtracks below Polyak's step
    average: jax.Array  # () float32 or wider: weighted average of the losses so far
    weight: jax.Array  # () float32 or wider: their weights together
    num_backtracks: jax.Array  # () int32: of the last step
    num_trials: jax.Array  # () int32: losses evaluated for them, with the accepted one
    value: jax.Array  # () float32 or wider: the loss where the last step ended, on its batch
    grad: Any  # None; with store_grad like params: the gradient there


def scale_by_ponos(
    c: ScalarOrSchedule = 0.5,
    c_p: ScalarOrSchedule = 0.1,
    decrease_factor: ScalarOrSchedule = 0.5,
    xi: ScalarOrSchedule = 1.0,
    max_learning_rate: ScalarOrSchedule = 10.0,
    min_learning_rate: ScalarOrSchedule = 1e-6,
    f_star: ScalarOrSchedule = 0.0,
    *,
    max_backtracks: int = 100,
    memory: bool = True,
    sufficient_decrease: Literal["slope"] | Callable[[Any, Any], jax.Array] = "slope",
    atol: float = 0.0,
    rtol: float = 0.0,
    store_grad: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by a step that a nonmonotone search finds on the current batch.

    With the loss f of this batch, the direction u that flows in and its slope
    :math:`s = -\langle u, \nabla f(w)\rangle`, the first trial is

    .. math:: \eta_0 = \operatorname{clip}\Big(\delta^{l}\,
        \frac{\max(f(w) - f^*, 0)}{c_p\, s + 10^{-8}},\ \eta_{\min},\ \eta_{\max}\Big)

    and :math:`\eta_e = \delta^e \eta_0` is accepted for the first e with

    .. math:: f(w + \eta_e u) \le \max(C, f(w)) - c\,\eta_e s, \qquad
        C \leftarrow \frac{\xi Q C + f(w)}{\xi Q + 1}, \quad Q \leftarrow \xi Q + 1

    up to rounding of the loss, after which :math:`l \leftarrow \max(l + e - 1, 0)`: on average
    there is at most one backtrack a step, and none while l stays 0. A step is one gradient and e+1
    losses, less those of trials that only a loss below :math:`f^*` could pass: they are counted
    as backtracks without being evaluated.

    Args:
      c: required decrease, in [0, 1], as a share of the slope, a number or schedule; 0.5.
      c_p: divides Polyak's step, above 0, a number or schedule; 0.1 to 0.5.
      decrease_factor: :math:`\delta` in (0, 1), a number or schedule; 0.5 to 0.9.
      xi: :math:`\xi` in [0, 1], weight of earlier losses, a number or schedule. 1 is their plain
        average, 0 the monotone search.
      max_learning_rate: :math:`\eta_{\max}`, a number or schedule; 10, and 1e10 for convex losses.
      min_learning_rate: :math:`\eta_{\min}` of the first trial, a number or schedule.
      f_star: a loss that no trial can be below, a number or schedule. Set it where the loss has a
        floor (label smoothing, weight decay): otherwise every step backtracks from far too long a
        start.
      max_backtracks: trials of a search. After that the step is 1e-6, as published.
      memory: whether l is used; it is counted in any case.
      sufficient_decrease: "slope", or a function `(updates, grad) -> ()` that takes the place of s
        everywhere, such as the squared norm of the gradient in another metric.
      atol: a trial passes within this of the reference value, in the unit of the loss.
      rtol: likewise, as a share of the reference value; 4 roundings of it pass in any case.
      store_grad: keep the gradient at the accepted point for `optax.value_and_grad_from_state`,
        which is right only where the next step has the same batch; costs a copy of the parameters.

    Returns:
      An element whose update takes `params`, `value=f(w)`, `grad=`, the raw gradient, and
      `value_fn=f`. Other arguments that `value_fn` has by name are passed on to it; every call has
      to use the same batch and the same random numbers. Its state is `PonosState`. A trial whose
      loss is NaN or infinite counts as failed. Where value or slope is not finite, or the slope is
      not that of a descent, the step is 0 and nothing is remembered. Over devices, value, grad and
      value_fn have to be averages over all of them, so that each takes the same decision.

    Raises:
      ValueError: a missing argument of the update, gradients of another tree than the parameters,
        complex leaves, a value out of the ranges above.

    Equals, for `xi=0` without memory where Polyak's step is above `max_learning_rate`,
    `optax.scale_by_backtracking_linesearch` with `slope_rtol=c, increase_factor=inf`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structured as oxs
      >>> loss = lambda w: 0.5 * jnp.sum(w**2)
      >>> search = oxs.step_sizes.scale_by_ponos()
      >>> w = jnp.array([3.0, 4.0])
      >>> value, grad = jax.value_and_grad(loss)(w)
      >>> updates, state = search.update(
      ...     -grad, search.init(w), w, value=value, grad=grad, value_fn=loss
      ... )
      >>> print(state.learning_rate, state.num_backtracks, state.memory)
      0.625 3 2

    References:
      Galli, Rauhut and Schmidt, `Don't be so Monotone <https://arxiv.org/abs/2306.12747>`_,
      NeurIPS 2023. Its code, followed here, averages the losses as they are; the paper feeds the
      larger of average and loss back. `f_star` is not used in the code.
    """
    check_share("c", c)
    check_share("xi", xi)
    check_share("decrease_factor", decrease_factor)
    check_positive("c_p", c_p)
    check_nonnegative("max_learning_rate", max_learning_rate)
    check_nonnegative("min_learning_rate", min_learning_rate)
    if (
        isinstance(max_backtracks, bool)
        or not isinstance(max_backtracks, int)
        or max_backtracks < 1
    ):
        raise ValueError(f"max_backtracks must be a whole number above 0, got {max_backtracks!r}")
    if sufficient_decrease != "slope" and not callable(sufficient_decrease):
        raise ValueError(
            "sufficient_decrease must be 'slope' or a function of updates and gradient, got "
            f"{sufficient_decrease!r}"
        )

    def init(params: Any) -> PonosState:
        check_real("scale_by_ponos", params, splits=False)
        dtype = scalar_dtype(params)
        zero = functools.partial(jnp.zeros, (), dtype)
        count = functools.partial(jnp.zeros, (), jnp.int32)
        grad = jax.tree.map(jnp.zeros_like, params) if store_grad else None
        value = jnp.full((), jnp.inf, dtype)
        counts = count(), count()
        return PonosState(new_clock(), zero(), count(), zero(), zero(), *counts, value, grad)

    def update(
        updates: Any,
        state: PonosState,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Callable[..., Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, PonosState]:
        check_params("scale_by_ponos", params)
        if value is None or grad is None or value_fn is None:
            raise ValueError(
                "scale_by_ponos evaluates the loss of the current batch: call update(grads, state, "
                "params, value=value, grad=grads, value_fn=loss), with "
                "value, grads = jax.value_and_grad(loss)(params)"
            )
        if jnp.shape(value) != ():
            raise ValueError(f"value must be a scalar loss, got shape {jnp.shape(value)}")
        for tree in (updates, grad):
            check_same_tree("scale_by_ponos", tree, params, whose="the parameters")
        dtype = state.average.dtype
        loss = bound(value_fn, extra)
        number = lambda x: jnp.asarray(now(x, state.clock), dtype)  # noqa: E731
        f, shrink, ask = jnp.asarray(value, dtype), number(decrease_factor), number(c)
        if callable(sufficient_decrease):
            slope = jnp.asarray(sufficient_decrease(updates, grad), dtype)
        else:
            slope = -dot(updates, grad).astype(dtype)
        flat = norm(grad) < _FLAT

        average, weight = zhang_hager_reference(state.average, state.weight, f, number(xi))
        reference = jnp.maximum(average, f)
        slack = atol + (rtol + 4 * jnp.finfo(dtype).eps) * jnp.abs(reference)

        def enough(step: jax.Array) -> jax.Array:
            return reference - ask * step * slope + slack

        lowest, power = number(f_star), lambda e: shrink ** e.astype(dtype)
        first = polyak_initial_step(f, slope, number(c_p), lowest)
        if memory:
            first = first * power(state.memory)
        first = jnp.clip(first, number(min_learning_rate), number(max_learning_rate))
        # Steps so long that only a loss below the smallest one could pass: not worth a loss.
        steps = first * power(jnp.arange(max_backtracks - 1))
        hopeless = (f > lowest) & (enough(steps) < lowest)
        skipped = jnp.sum(hopeless, dtype=jnp.int32)

        known = jnp.isfinite(f) & jnp.isfinite(slope) & (slope >= 0)
        moves = known & ~flat & (f != lowest) & (slope > 0)
        wide = jax.tree.map(at_least_float32, updates)
        scaled = lambda step: as_updates(  # noqa: E731
            jax.tree.map(lambda u: u * step.astype(u.dtype), wide), updates, params
        )

        start = Search(
            jnp.zeros((), jnp.int32),
            jnp.where(moves, skipped, 0),
            first * power(skipped),
            f,
            ~moves,
            jax.tree.map(lambda g, s: jnp.asarray(g, s.dtype), grad, state.grad)
            if store_grad
            else None,
        )
        point = lambda step: optax.apply_updates(params, scaled(step))  # noqa: E731
        found = backtrack(loss, point, enough, shrink, start, max_backtracks)

        step = jnp.where(moves, found.step, 0)
        remembered = jnp.maximum(state.memory + found.backtracks - 1, 0)
        new = PonosState(
            clock=tick(state.clock),
            learning_rate=step,
            memory=jnp.where(moves, remembered, state.memory),
            average=jnp.where(known, average, state.average),
            weight=jnp.where(known, weight, state.weight),
            num_backtracks=found.backtracks,
            num_trials=found.trials,
            value=found.value,
            grad=found.grad,
        )
        # A direction that is not finite times 0 would be NaN.
        return jax.tree.map(lambda u: jnp.where(moves, u, jnp.zeros_like(u)), scaled(step)), new

    return optax.GradientTransformationExtraArgs(init, update)
