"""Adam, its direction without correction of bias, and the correction by itself."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import FirstMoment, SecondMoment
from optax_structured.trees.checks import check_fraction, check_nonnegative
from optax_structured.trees.precision import (
    as_stored,
    as_updates,
    at_least_float32,
    scalar_dtype,
    times,
    wide_dtype,
)
from optax_structured.trees.tree_checks import check_real


def uncorrected_adam(
    b1: ScalarOrSchedule = 0.9, b2: ScalarOrSchedule = 0.999, eps: ScalarOrSchedule = 1e-6
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction without correction of bias.

    .. math:: M_t = b_1 M_{t-1} + (1-b_1) G_t, \quad V_t = b_2 V_{t-1} + (1-b_2) G_t^2, \quad
        N_t = M_t / (\sqrt{V_t} + \epsilon)

    Follow it, perhaps after something that reads its norms as `fira` does, by `bias_correction`.

    Args:
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to the uncorrected root, in the unit of the gradient, a number or schedule. Early
        on it weighs :math:`(1-b_2^t)^{-1/2}` times more than in `optax.scale_by_adam`.

    Returns:
      An element that needs no `params`. Its state is `optax.ScaleByAdamState`, float32 or wider.

    Raises:
      ValueError: a value out of the ranges above.

    Equals, followed by `bias_correction(b1, b2)`, `optax.scale_by_adam(b1, b2, eps=0)` for
    `eps=0`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> adam = oxs.transforms.uncorrected_adam(b1=0.5, b2=0.75)
      >>> updates, _ = adam.update(jnp.array([2.0, -3.0]), adam.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [ 1. -1.]
    """
    check_adam(b1, b2, eps)

    def update(
        updates: Any, state: optax.ScaleByAdamState, params: Any = None, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        first, second, floor = (now(x, state) for x in (b1, b2, eps))
        mu, nu = _moments(updates, state, first, second)
        directions = jax.tree.map(lambda m, v: divided(m, v, floor), mu, nu)
        moments = as_stored((mu, nu), (state.mu, state.nu))
        new = optax.ScaleByAdamState(optax.safe_increment(state.count), *moments)
        return as_updates(directions, updates, params), new

    def init(params: Any) -> optax.ScaleByAdamState:
        check_real("uncorrected_adam", params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *_zeros(params))

    return optax.GradientTransformationExtraArgs(init, update)


class DebiasedAdamState(NamedTuple):
    """State of `debiased_adam`."""

    clock: Clock  # steps since init, for schedules
    mean: jax.Array  # () float32 or wider: what b1 averages ones to, 1 - b1^t
    mean_square: jax.Array  # () float32 or wider: the same for b2
    mu: FirstMoment[Any]  # like params, float32 or wider: M
    nu: SecondMoment[Any]  # like params, float32 or wider: V


def debiased_adam(
    b1: ScalarOrSchedule = 0.9, b2: ScalarOrSchedule = 0.999, eps: ScalarOrSchedule = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction, every setting of which may follow a schedule.

    .. math:: \hat M_t = \frac{M_t}{1-b_1^t}, \quad \hat V_t = \frac{V_t}{1-b_2^t}, \quad
        N_t = \hat M_t / (\sqrt{\hat V_t} + \epsilon)

    For schedules, :math:`1-b^t` is the average of ones with the same weights as the moments.

    Args:
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to the corrected root, in the unit of the gradient, a number or schedule.

    Returns:
      An element that needs no `params`. Its state is `DebiasedAdamState`.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.scale_by_adam`, with moments in float32 at least, and with a direction of zero
    instead of NaN where there never was a gradient and eps is 0.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> adam = oxs.transforms.debiased_adam(b1=lambda count: 1 - 1 / (count + 2))
      >>> updates, _ = adam.update(jnp.array([2.0, -3.0]), adam.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [ 1. -1.]
    """
    check_adam(b1, b2, eps)

    def init(params: Any) -> DebiasedAdamState:
        check_real("debiased_adam", params)
        mean, square = (jnp.zeros((), scalar_dtype(params)) for _ in range(2))
        return DebiasedAdamState(new_clock(), mean, square, *_zeros(params))

    def update(
        updates: Any, state: DebiasedAdamState, params: Any = None, **_: Any
    ) -> tuple[Any, DebiasedAdamState]:
        first, second, floor = (now(x, state.clock) for x in (b1, b2, eps))
        mean = average(state.mean, 1.0, first)
        square = average(state.mean_square, 1.0, second)
        mu, nu = _moments(updates, state, first, second)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return divided(m / mean.astype(m.dtype), v / square.astype(v.dtype), floor)

        directions = as_updates(jax.tree.map(direction, mu, nu), updates, params)
        new = as_stored((mean, square, mu, nu), state[1:])
        return directions, DebiasedAdamState(tick(state.clock), *new)

    return optax.GradientTransformationExtraArgs(init, update)


class BiasCorrectionState(NamedTuple):
    """State of `bias_correction`."""

    clock: Clock  # steps since init, for schedules
    mean: jax.Array  # () float32 or wider: what b1 averages ones to, 1 - b1^t
    mean_square: jax.Array  # () float32 or wider: the same for b2


def bias_correction(
    b1: ScalarOrSchedule = 0.9, b2: ScalarOrSchedule = 0.999
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by Adam's correction of bias.

    .. math:: U_t \leftarrow \frac{\sqrt{1-b_2^t}}{1-b_1^t}\, U_t

    For schedules, :math:`1-b^t` is the average of ones with the same weights as the moments.

    Args:
      b1, b2: decays of the Adam that it corrects, in [0, 1), numbers or schedules.

    Returns:
      An element that needs no `params`. Its state is `BiasCorrectionState`.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.identity` for `b1=b2=0`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> correction = oxs.transforms.bias_correction(b1=0.5, b2=0.75)
      >>> updates, state = correction.update(jnp.ones(2), correction.init(jnp.zeros(2)))
      >>> print(updates)
      [1. 1.]
    """
    check_fraction("b1", b1)
    check_fraction("b2", b2)

    def init(params: Any) -> BiasCorrectionState:
        totals = (jnp.zeros((), scalar_dtype(params)) for _ in range(2))
        return BiasCorrectionState(new_clock(), *totals)

    def update(
        updates: Any, state: BiasCorrectionState, params: Any = None, **_: Any
    ) -> tuple[Any, BiasCorrectionState]:
        mean = average(state.mean, 1.0, now(b1, state.clock))
        square = average(state.mean_square, 1.0, now(b2, state.clock))
        factor = jnp.sqrt(square) / mean
        corrected = jax.tree.map(lambda u: times(u, factor), updates)
        corrected = as_updates(corrected, updates, params)
        new = as_stored((mean, square), state[1:])
        return corrected, BiasCorrectionState(tick(state.clock), *new)

    return optax.GradientTransformationExtraArgs(init, update)


def average(before: jax.Array, new: Any, decay: Any) -> jax.Array:
    """One step of a moving average, in float32 at least, with weights that add up to one in it.

    The moments and their correction share it: in float32, 1 - 0.999 is off by 5e-5, and only equal
    errors cancel.
    """
    before = at_least_float32(before)
    # The weights of a number are numbers: only those of a schedule are part of the program.
    keep = (jnp if isinstance(decay, jax.Array) else np).asarray(decay, before.dtype)
    return keep * before + (1 - keep) * new


def divided(mean: jax.Array, square: jax.Array, eps: Any) -> jax.Array:
    """Adam's direction."""
    floor = (jnp if isinstance(eps, jax.Array) else np).asarray(eps, square.dtype)
    root = jnp.sqrt(square) + floor
    if isinstance(floor, jax.Array) or floor == 0:
        # An entry without any gradient so far is 0/0 when eps is 0: it stays where it is.
        root = jax.lax.select(root == 0, jnp.ones_like(root), root)
    return mean / root


def check_adam(b1: Any, b2: Any, eps: Any) -> None:
    """Raises ValueError for settings out of range."""
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    check_nonnegative("eps", eps)


def _zeros(params: Any) -> tuple[Any, Any]:
    """Two moments; not one buffer twice, which a donated state may not hold."""
    mu = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
    return mu, jax.tree.map(jnp.zeros_like, mu)


def _moments(updates: Any, state: Any, b1: Any, b2: Any) -> tuple[Any, Any]:
    """`mu` and `nu` of a state one step later."""
    wide = jax.tree.map(lambda m, g: jnp.asarray(g, wide_dtype(m)), state.mu, updates)
    mu = jax.tree.map(lambda m, g: average(m, g, b1), state.mu, wide)
    return mu, jax.tree.map(lambda v, g: average(v, jnp.square(g), b2), state.nu, wide)
