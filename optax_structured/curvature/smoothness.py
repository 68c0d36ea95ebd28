"""Gradient-normalized smoothness: Newton-type steps whose radius adapts to what the loss does."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import Pending
from optax_structured.trees.checks import check_nonnegative, check_params, check_positive
from optax_structured.trees.precision import as_stored, as_updates, scalar_dtype
from optax_structured.trees.products import dot, norm
from optax_structured.trees.tree_checks import check_real, check_same_tree

_RADIUS_MIN = 1e-9


class GnsState(NamedTuple):
    """State of `scale_by_gns`."""

    clock: Clock  # steps since init, for schedules
    gamma: jax.Array  # () float32 or wider: radius with which the next search starts
    value: jax.Array  # () float32 or wider: the loss where the last step ended
    grad: Pending[Any]  # like params, in their precision: the gradient there
    num_trials: jax.Array  # () int32: linear systems solved in the last step


def scale_by_gns(
    hessian: Callable[[Any], Any] | None = None,
    *,
    solver: Literal["cholesky", "cg"] = "cholesky",
    metric: jax.Array | None = None,
    gamma: float = 1.0,
    eps: ScalarOrSchedule = 1e-8,
    max_trials: int = 41,
    cg_iterations: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton-type steps, regularised by the gradient norm over a radius that is searched.

    With an approximate Hessian H, a metric B, the dual norm
    :math:`\|g\|_* = \sqrt{g^\top B^{-1} g}` and :math:`\lambda = \|g\|_* / (\gamma + \epsilon)`,

    .. math:: d = -(H + \lambda B)^{-1} g, \qquad
        \text{accepted if } f(w) - f(w+d) \ge \frac{\|\nabla f(w+d)\|_*^2}{8\lambda}

    after which :math:`\gamma` doubles; until then it is halved. For :math:`H \ge 0` steps are no
    longer than :math:`\gamma`. A method for deterministic problems (fitting, generalised linear
    models): value and gradients have to be of the same data at every trial and step. A trial is a
    linear system and a value with gradient, of which the accepted one is kept for the next step.

    Args:
      hessian: a function of parameters. For "cholesky" to the matrix (D, D) in the order in which
        `jax.flatten_util.ravel_pytree` flattens them; for "cg" to a function of trees, such as
        `lambda w: hvp(loss, w)`. None for H = 0, normalised gradient descent.
      solver: "cholesky" solves exactly; an indefinite system counts as a failed trial. "cg" never
        forms a matrix, and takes the metric I.
      metric: B, (D, D), positive definite with a condition below 1e6; None for I.
      gamma: radius of the first search, above 0, in the unit of the parameters.
      eps: added to the radius, a number or schedule.
      max_trials: after so many the last trial is taken although it failed, unless it is not finite.
      cg_iterations: at most, per trial.

    Returns:
      An element that turns gradients into steps, with their sign: nothing has to follow it. Its
      update takes `params`, `value=`, `grad=` and `value_and_grad_fn=`, and
      `optax.value_and_grad_from_state` finds value and gradient in its state, `GnsState`.

    Raises:
      ValueError: a missing argument of the update, a metric with "cg", a value out of range.

    Equals Newton's method with an exact Hessian where it doubles the radius at every step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structured as oxs
      >>> loss = lambda w: jnp.sum(w**4) + jnp.sum(w**2)
      >>> optimizer = oxs.curvature.scale_by_gns(jax.hessian(loss))
      >>> w = jnp.array([1.0, -2.0])
      >>> state = optimizer.init(w)
      >>> both = jax.value_and_grad(loss)
      >>> for _ in range(8):
      ...     value, grad = both(w)
      ...     updates, state = optimizer.update(
      ...         grad, state, w, value=value, grad=grad, value_and_grad_fn=both
      ...     )
      ...     w = optax.apply_updates(w, updates)
      >>> print(bool(loss(w) < 1e-8))
      True

    References:
      Semenov, Jaggi and Doikov, `Gradient-Normalized Smoothness for Optimization with Approximate
      Hessians <https://arxiv.org/abs/2506.13710>`_, 2025. Where Cholesky fails its code takes the
      last trial; here the radius is halved, which restores positive definiteness.
    """
    if solver not in ("cholesky", "cg"):
        raise ValueError(f"solver must be 'cholesky' or 'cg', got {solver!r}")
    if solver == "cg" and metric is not None:
        raise ValueError("solver 'cg' takes the metric I: give metric=None, or solver='cholesky'")
    if not isinstance(max_trials, int) or max_trials < 1:
        raise ValueError(f"max_trials must be a whole number above 0, got {max_trials!r}")
    check_positive("gamma", gamma)
    check_nonnegative("eps", eps)

    def init(params: Any) -> GnsState:
        check_real("scale_by_gns", params, splits=False)
        dtype = scalar_dtype(params)
        return GnsState(
            new_clock(),
            jnp.full((), gamma, dtype),
            jnp.full((), jnp.inf, dtype),
            jax.tree.map(lambda p: jnp.zeros_like(jnp.asarray(p, jnp.result_type(p))), params),
            jnp.zeros((), jnp.int32),
        )

    def update(
        updates: Any,
        state: GnsState,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_and_grad_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        **_: Any,
    ) -> tuple[Any, GnsState]:
        check_params("scale_by_gns", params)
        if value is None or grad is None or value_and_grad_fn is None:
            raise ValueError(
                "scale_by_gns tries steps: call update(grads, state, params, value=value, "
                "grad=grads, value_and_grad_fn=jax.value_and_grad(loss))"
            )
        for tree in (updates, grad):
            check_same_tree("scale_by_gns", tree, state.grad)
        dtype = state.gamma.dtype
        wide = jax.tree.map(lambda g: jnp.asarray(g, dtype), grad)  # a system has one precision
        dual, solve = _system(hessian, metric, solver, cg_iterations, params, wide)
        size = jnp.asarray(dual(wide), dtype)
        offset = jnp.asarray(now(eps, state.clock), dtype)
        f = jnp.asarray(value, dtype)

        def trial(search: _Search) -> _Search:
            damping = size / (search.gamma + offset)
            step = solve(damping)
            point = optax.apply_updates(params, as_updates(step, updates, params))
            reached, slope = value_and_grad_fn(point)
            reached = jnp.asarray(reached, dtype)
            slope = jax.tree.map(lambda s, g: jnp.asarray(s, g.dtype), slope, wide)
            accepted, radius = gns_radius_update(search.gamma, f, reached, dual(slope), damping)
            return _Search(search.trials + 1, radius, step, reached, slope, accepted)

        nowhere = jax.tree.map(jnp.zeros_like, wide)
        start = _Search(
            jnp.zeros((), jnp.int32), state.gamma, nowhere, f, wide, ~(size > 0) | ~jnp.isfinite(f)
        )
        found = jax.lax.while_loop(
            lambda search: ~search.accepted & (search.trials < max_trials), trial, start
        )
        # After the last trial there may be a point where nothing is known: stay.
        fine = jnp.isfinite(found.value)
        choose = lambda a, b: jax.tree.map(lambda x, y: jnp.where(fine, x, y), a, b)  # noqa: E731
        new = GnsState(
            tick(state.clock),
            found.gamma,
            jnp.where(fine, found.value, f),
            as_stored(choose(found.grad, wide), state.grad),
            found.trials,
        )
        return as_updates(choose(found.step, nowhere), updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def gns_radius_update(
    gamma: jax.Array, value: Any, new_value: Any, new_dual_norm: Any, damping: Any
) -> tuple[jax.Array, jax.Array]:
    r"""Whether a damped step is accepted, and the next radius: a rule for any preconditioner.

    .. math:: f - f_+ \ge \frac{\|g_+\|_*^2}{8\lambda}

    Args:
      gamma: the radius of this trial, () .
      value: f before the step, () .
      new_value: after it; NaN is a failure.
      new_dual_norm: norm of the gradient after it, in the dual of the metric of the damping.
      damping: :math:`\lambda` of this trial.

    Returns:
      `(accepted, gamma)`: doubled on success, to 1e-9 at least, halved otherwise.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> accepted, gamma = oxs.curvature.gns_radius_update(jnp.array(1.0), 2.0, 1.0, 1.0, 0.5)
      >>> print(accepted, gamma)
      True 2.0

    References:
      Semenov, Jaggi and Doikov, `Gradient-Normalized Smoothness
      <https://arxiv.org/abs/2506.13710>`_, 2025.
    """
    accepted = value - new_value >= jnp.square(new_dual_norm) / (8 * damping)
    return accepted, jnp.where(accepted, jnp.maximum(2 * gamma, _RADIUS_MIN), gamma / 2)


class _Search(NamedTuple):
    trials: jax.Array
    gamma: jax.Array
    step: Any
    value: jax.Array
    grad: Any
    accepted: jax.Array


def _system(
    hessian: Callable[[Any], Any] | None,
    metric: Any,
    solver: str,
    iterations: int,
    params: Any,
    grad: Any,
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The dual norm of a gradient, and -(H + damping B)^-1 g as a function of the damping."""
    if hessian is None and metric is None:
        return norm, lambda damping: jax.tree.map(lambda g: -g / damping, grad)
    if solver == "cg":
        product = hessian(params) if hessian is not None else optax.tree.zeros_like
        as_weights = lambda v, p: v.astype(jnp.result_type(p))  # noqa: E731

        def solve(damping: jax.Array) -> Any:
            def damped(v: Any) -> Any:
                image = product(jax.tree.map(as_weights, v, params))
                return jax.tree.map(lambda h, x: h.astype(x.dtype) + damping * x, image, v)

            return jax.tree.map(jnp.negative, _conjugate_gradients(damped, grad, iterations))

        return norm, solve
    flat, unravel = ravel_pytree(grad)
    B = jnp.eye(len(flat), dtype=flat.dtype) if metric is None else jnp.asarray(metric, flat.dtype)
    H = jnp.zeros_like(B) if hessian is None else jnp.asarray(hessian(params), flat.dtype)
    if H.shape != B.shape or B.shape != (len(flat),) * 2:
        raise ValueError(
            f"hessian and metric must be {(len(flat),) * 2} matrices for these parameters, got "
            f"{H.shape} and {B.shape}"
        )
    root = jnp.linalg.cholesky(B)

    def dual(g: Any) -> jax.Array:
        return jnp.linalg.norm(
            jax.scipy.linalg.solve_triangular(root, ravel_pytree(g)[0], lower=True)
        )

    def solve_dense(damping: jax.Array) -> Any:
        factor = jnp.linalg.cholesky(H + damping.astype(H.dtype) * B)  # NaN where indefinite
        return unravel(-jax.scipy.linalg.cho_solve((factor, True), flat))

    return dual, solve_dense


def _conjugate_gradients(product: Callable[[Any], Any], b: Any, iterations: int) -> Any:
    """`jax.scipy.sparse.linalg.cg`, whose inner products refuse axes that are sharded by name."""
    add = lambda a, c, x: jax.tree.map(lambda a, x: a + c * x, a, x)  # noqa: E731

    def step(carry: Any) -> Any:
        count, x, residual, direction, square = carry
        image = product(direction)
        length = square / dot(direction, image)
        residual = add(residual, -length, image)
        new = dot(residual, residual)
        return (
            count + 1,
            add(x, length, direction),
            residual,
            add(residual, new / square, direction),
            new,
        )

    square = dot(b, b)
    start = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, b), b, b, square
    goes_on = lambda carry: (carry[0] < iterations) & (carry[4] > 1e-12 * square)  # noqa: E731
    return jax.lax.while_loop(goes_on, step, start)[1]
