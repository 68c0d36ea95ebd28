"""LV-HBA: bilevel problems with coupling constraints, one loop and gradients only."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_structured.contrib.bilevel.base import BilevelSolver
from optax_structured.contrib.bilevel.projections import Projection
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.trees.checks import check_nonnegative, check_positive


class LVHBAState(NamedTuple):
    """State of `lv_hba`."""

    clock: Clock  # steps since init: k of the penalty
    theta: Any  # like y: where the lower level goes by itself
    multipliers: jax.Array  # (p,): of the constraints at theta
    anchor: jax.Array  # (p,): z, which the multipliers stay near
    inner: Any  # state of the optimizer of (theta, multipliers)
    outer: Any  # state of the optimizer of (x, y)


def growing_penalty(initial: float = 1.0, power: float = 0.3) -> optax.Schedule:
    r"""The penalty :math:`c_k = c_0 (k+1)^p`, by which the upper level is divided.

    Args:
      initial: :math:`c_0 > 0`, 0.1 to 1.
      power: p in [0, 1/2), 0.3 to 0.49.

    Returns:
      A schedule.

    Example:
      >>> print(growing_penalty(0.5, 0.25)(15))
      1.0
    """
    check_positive("initial", initial)
    check_nonnegative("power", power)
    return lambda count: initial * (jnp.asarray(count, float) + 1) ** power


def lv_hba(
    upper: Callable[[Any, Any], jax.Array],
    lower: Callable[[Any, Any], jax.Array],
    constraint: Callable[[Any, Any], jax.Array] | None = None,
    *,
    project: Projection | None = None,
    project_lower: Callable[[Any, Any], Any] | None = None,
    equality: bool = False,
    bound: ArrayLike = 1e3,
    outer: optax.GradientTransformation | None = None,
    inner: optax.GradientTransformation | None = None,
    anchor_rate: ScalarOrSchedule = 1e-2,
    gamma1: float = 1.0,
    gamma2: float = 1.0,
    penalty: ScalarOrSchedule | None = None,
) -> BilevelSolver:
    r"""One step of descent a level, on a smooth value function of the lower one.

    .. math:: \min_{x,y} F(x,y) \quad\text{where } y \text{ minimises } f(x,\cdot)
        \text{ over } \{y : g(x,y) \le 0\}

    is penalised to :math:`F/c_k + f - v` with the value function

    .. math:: v(x,y,z) = \min_\theta \max_\lambda f(x,\theta) + \langle\lambda, g(x,\theta)\rangle
        + \tfrac{1}{2\gamma_1}\|\theta-y\|^2 - \tfrac{1}{2\gamma_2}\|\lambda-z\|^2 .

    Each update steps :math:`(\theta,\lambda)` towards that saddle point, then :math:`(x,y)` down
    the gradient at the new :math:`\theta,\lambda`, projected on the constraint, then z towards
    :math:`\lambda`. There is no Hessian and no inner loop; f and g are convex in y.

    Args:
      upper: F, `upper(x, y)`, ().
      lower: f, `lower(x, y)`, ().
      constraint: g, `constraint(x, y)`, (p,); None for none, which leaves a Moreau envelope.
      project: of `(x, y)` on the set where g holds: `affine_projection`, `dykstra`,
        `optax.projections`, or your own. Start from a point in it. None: no set.
      project_lower: `project_lower(x, theta)`, on the set of y if it has one.
      equality: g = 0 instead of g <= 0; multipliers then have both signs.
      bound: r, the largest multiplier.
      outer: optimizer of `(x, y)`; None: `optax.sgd(1e-2)`; 1e-3 to 0.1.
      inner: optimizer of `(theta, multipliers)`; None: `optax.sgd(1e-2)`; 1e-2 to 0.1. Descent and
        ascent in one: it diverges if the rate is large for the size of the coupling.
      anchor_rate: of z, a number or schedule; 1e-3 to 0.1.
      gamma1: :math:`\gamma_1 > 0`, 0.1 to 10.
      gamma2: :math:`\gamma_2 > 0`, 0.1 to 10.
      penalty: :math:`c_k`, a number or schedule; None: `growing_penalty()`. Where it stays small,
        the end is biased towards the upper level.

    Returns:
      A `BilevelSolver`: `init(x, y)` and `update(x, y, state)`. Its state is `LVHBAState`.

    Raises:
      ValueError: a value out of the ranges above; a constraint that is not a vector.

    Equals, where F is 0, a method that stays at any feasible optimum of the lower level.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> solver = lv_hba(
      ...     lambda x, y: (y - 3.0) ** 2, lambda x, y: (y - x) ** 2,
      ...     outer=optax.sgd(0.05), inner=optax.sgd(0.1))
      >>> def step(carry, _):
      ...     return solver.update(*carry), None
      >>> start = (jnp.zeros(()), jnp.zeros(()))
      >>> (x, y, _), _ = jax.lax.scan(step, (*start, solver.init(*start)), length=2000)
      >>> print(f"{x:.2f} {y:.2f}")
      3.00 3.00

    References:
      Yao, Yu, Zeng and Zhang, `Constrained Bi-Level Optimization: Proximal Lagrangian Value
      Function Approach and Hessian-free Algorithm <https://arxiv.org/abs/2401.16164>`_, 2024. Its
      scripts for SVMs do not update z, let multipliers of inequalities be negative and discard the
      step in x; the equations of the paper are followed here.
    """
    check_positive("gamma1", gamma1)
    check_positive("gamma2", gamma2)
    check_nonnegative("anchor_rate", anchor_rate)
    outer = optax.sgd(1e-2) if outer is None else outer
    inner = optax.sgd(1e-2) if inner is None else inner
    penalty = growing_penalty() if penalty is None else penalty
    least = -jnp.asarray(bound) if equality else 0.0

    def limits(x: Any, y: Any) -> jax.Array:
        return jnp.zeros((0,)) if constraint is None else constraint(x, y)

    def lagrangian(x: Any, y: Any, multipliers: jax.Array) -> jax.Array:
        return lower(x, y) + jnp.vdot(multipliers, limits(x, y))

    def init(x: Any, y: Any) -> LVHBAState:
        shape = jax.eval_shape(limits, x, y)
        if shape.ndim != 1:
            raise ValueError(
                f"lv_hba: the constraint returned an array of shape {shape.shape}; return a vector "
                "(p,), such as jnp.concatenate or jnp.atleast_1d of its parts"
            )
        zeros = jnp.zeros(shape.shape, shape.dtype)
        theta = jax.tree.map(jnp.array, y)
        states = inner.init((theta, zeros)), outer.init((x, y))
        return LVHBAState(new_clock(), theta, zeros, zeros, *states)

    def update(x: Any, y: Any, state: LVHBAState) -> tuple[Any, Any, LVHBAState]:
        theta, multipliers, z = state.theta, state.multipliers, state.anchor
        slope, excess = jax.grad(lagrangian, argnums=(1, 2))(x, theta, multipliers)
        slope = jax.tree.map(lambda g, t, y: g + (t - y) / gamma1, slope, theta, y)
        ascent = (multipliers - z) / gamma2 - excess
        inner_updates, inner_state = inner.update(
            (slope, ascent), state.inner, (theta, multipliers)
        )
        theta, multipliers = optax.apply_updates((theta, multipliers), inner_updates)
        theta = theta if project_lower is None else project_lower(x, theta)
        multipliers = jnp.clip(multipliers, least, bound)

        def gap(x: Any, y: Any) -> jax.Array:
            """F/c + f(x, y) - the Lagrangian at theta, whose gradients are those of v in x."""
            value = upper(x, y) / now(penalty, state.clock) + lower(x, y)
            return value - lagrangian(x, theta, multipliers)

        dx, dy = jax.grad(gap, argnums=(0, 1))(x, y)
        dy = jax.tree.map(lambda g, y, t: g - (y - t) / gamma1, dy, y, theta)
        outer_updates, outer_state = outer.update((dx, dy), state.outer, (x, y))
        point = optax.apply_updates((x, y), outer_updates)
        x, y = point if project is None else project(point)
        rate = now(anchor_rate, state.clock)
        z = jnp.clip(z + (rate * (multipliers - z) / gamma2).astype(z.dtype), least, bound)
        return x, y, LVHBAState(tick(state.clock), theta, multipliers, z, inner_state, outer_state)

    return BilevelSolver(init, update)
