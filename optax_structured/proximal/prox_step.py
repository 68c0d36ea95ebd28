"""The last proximal element: solves each subproblem and turns the point into an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.proximal.solvers import Exact, Solver
from optax_structured.proximal.subproblem import Subproblem, unpenalised
from optax_structured.proximal.target import TargetSparsity, share_of_zeros
from optax_structured.regularizers.base import Regularizer
from optax_structured.regularizers.coupled import Joint, joined
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.trees import Rules, as_rules, resolve
from optax_structured.trees.checks import check_nonnegative, check_params, is_more_than_zero
from optax_structured.trees.precision import (
    as_stored,
    at_least_float32,
    common_dtype,
    scalar_dtype,
    wide_dtype,
)
from optax_structured.trees.rules import check_some_use
from optax_structured.trees.tree_checks import check_real, check_same_tree
from optax_structured.xla.leaf_loops import Work, in_turn, made


class ProxStepState(NamedTuple):
    """State of `prox_step`."""

    clock: Clock  # steps since init, for schedules; kept by a restart
    strength: jax.Array  # () float32 or wider: that of the last step, for `prox_point`
    zeros: jax.Array  # () float32 or wider: their share in its point, only for `TargetSparsity`


def prox_step(
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | TargetSparsity | None = None,
    *,
    weight: ScalarOrSchedule | None = None,
    solver: Solver = Exact(),  # noqa: B008  (frozen)
) -> optax.GradientTransformationExtraArgs:
    r"""Proximal step: after the proximal elements, or after any optax optimizer.

    At the end of a proximal chain it minimises the subproblem of each leaf,

    .. math:: \hat W = \arg\min_w \langle V, w\rangle
        + \tfrac12\langle w - W_0, P (w - W_0)\rangle + \alpha\lambda\,\psi(w),

    and after any other transformation with updates :math:`u` and a step size :math:`\gamma`,

    .. math:: \hat W = \operatorname{prox}_{\gamma\lambda\psi}(W + u).

    The update is :math:`\hat W - W` in the precision of the parameters, or of the updates where
    that is wider, so what is zero in :math:`\hat W` is exactly zero in the new parameters, if
    nothing follows but the `optax.scale` of momentum.

    Args:
      regularizer: :math:`\psi`, one `Regularizer` for all leaves that can take it, or `rules` of
        them; None changes nothing. Leaves without one get :math:`W_0 - V/P`, or :math:`W + u`.
      strength: :math:`\lambda`, in units of the loss per unit of :math:`\psi`: a number or
        schedule, or a `TargetSparsity` that finds it. It does not depend on the learning rate. 0
        switches penalties off, not constraints. Sweep it along `diagnostics.strength_path`.
      weight: :math:`\gamma`, the learning rate of the optimizer before, a number or schedule. Only
        after plain updates, where it is required: a prox cannot read it off the updates.
      solver: how subproblems in a diagonal metric are solved: `Exact`, `ProximalGradient` or
        `WeightedALS`.

    Returns:
      An element that needs `params` and must be the last one, but for `record_point` and the
      `optax.scale` of momentum. Its state is `ProxStepState`.

    Raises:
      ValueError: a negative or NaN strength or weight; a regularizer without strength, or a
        strength without regularizer; a missing or superfluous weight; missing `params`; a rule that
        matches nothing.

    Equals projection onto the constraint for `Box` and `NonNegative`, and does nothing without
    regularizer.

    After an adaptive optimizer such as Adam this prox is in the Euclidean metric and not in that of
    the optimizer: use `prox_adam` for the latter.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(optax.sgd(0.1), oxs.prox_step(oxs.L1(), 2.0, weight=0.1))
      >>> params = jnp.array([1.0, 0.1])
      >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0.8 0. ]
    """
    if regularizer is not None and strength is None:
        raise ValueError(
            "prox_step got a regularizer but no strength: give strength=..., a number or schedule "
            "(for a constraint such as Box, which has none, any positive number)"
        )
    target = strength if isinstance(strength, TargetSparsity) else None
    if strength is not None and target is None:
        check_nonnegative("strength", strength)
    used = strength is not None and (target is not None or is_more_than_zero(strength))
    if used and not any(as_rules(regularizer).values):
        raise ValueError(
            f"prox_step got strength={strength!r} but no regularizer that it could be the "
            "strength of: give one such as L1(), or leave strength out"
        )
    if weight is not None:
        check_nonnegative("weight", weight)
    switched_off = isinstance(strength, int | float) and strength == 0

    def specs(params: Any) -> list[Regularizer | None]:
        found = resolve(as_rules(regularizer), params)
        for spec in found:
            if not (spec is None or isinstance(spec, Regularizer)):
                raise TypeError(
                    f"prox_step takes a Regularizer such as L1(), rules of them, or None; got "
                    f"{spec!r}"
                )
        if regularizer is not None:
            check_some_use(
                regularizer, params, Regularizer, "no leaf can take the regularizer that is given"
            )
        return [spec if spec and (spec.constraint or not switched_off) else None for spec in found]

    def strength_now(state: ProxStepState, dtype: Any) -> jax.Array:
        if target is not None:
            return target.next(state.strength.astype(dtype), state.zeros, state.clock.count)
        return jnp.asarray(0.0 if strength is None else now(strength, state.clock), dtype)

    def init(params: Any) -> ProxStepState:
        check_real("prox_step", params)
        # A rule that matches nothing fails here, not at the first step.
        found = [spec for spec in specs(params) if spec is not None]
        if target is not None and found and not any(spec.penalizes for spec in found):
            raise ValueError(
                "prox_step got a TargetSparsity, but no leaf has a penalty whose zeros depend on a "
                "strength: give one such as L1(), or any number for constraints"
            )
        start, zeros = (target.start, target.share) if target else (0.0, 0.0)
        dtype = scalar_dtype(params)
        state = ProxStepState(new_clock(), jnp.asarray(start, dtype), jnp.asarray(zeros, dtype))
        return state._replace(strength=strength_now(state, dtype))

    def update(
        updates: Any, state: ProxStepState, params: Any = None, **_: Any
    ) -> tuple[Any, ProxStepState]:
        check_params("prox_step", params)
        check_same_tree("prox_step", updates, params, whose="the parameters")
        dtype = at_least_float32(state.strength).dtype
        gamma = None if weight is None else jnp.asarray(now(weight, state.clock), dtype)
        scale = strength_now(state, dtype)

        def pose(u: Any, p: jax.Array, spec: Regularizer | None) -> Problem | None:
            sub = u if isinstance(u, Subproblem) else None
            _check_weight(sub, gamma, spec)
            if sub is None and spec is not None:
                sub = _around_plain(u, p, gamma)
            return None if sub is None else Problem(sub, spec, p)

        structure: Any = jax.tree.structure(updates)
        leaves = jax.tree.leaves(updates)
        leaves = [u if isinstance(u, Subproblem) else jnp.asarray(u) for u in leaves]
        current = [jnp.asarray(p) for p in jax.tree.leaves(params)]
        problems = [pose(*row) for row in zip(leaves, current, specs(params), strict=True)]
        posed = [problem for problem in problems if problem]
        found = solve_all(solver, posed, scale)
        points = iter(found)

        def move(u: Any, p: jax.Array, problem: Problem | None) -> jax.Array:
            if problem is None:
                return u.astype(common_dtype(u.dtype, p.dtype))
            w = next(points)
            return (w - p.astype(w.dtype)).astype(common_dtype(u.dtype, p.dtype))

        updates = structure.unflatten(map(move, leaves, current, problems))
        zeros = state.zeros
        if target is not None:
            zeros = share_of_zeros(zip(found, (x.regularizer for x in posed), strict=True))
        last = as_stored((scale, zeros), (state.strength, state.zeros))
        return updates, ProxStepState(tick(state.clock), *last)

    return optax.GradientTransformationExtraArgs(init, update)


class Problem(NamedTuple):
    """What is to be solved for one leaf."""

    sub: Subproblem
    regularizer: Regularizer | None
    params: jax.Array  # like the leaf: where an iteration starts, unless the subproblem says


def solve_all(solver: Solver, problems: list[Problem], strength: jax.Array) -> list[jax.Array]:
    """The point of each problem, like its leaf; `strength`, a scalar, is that of regularizers."""

    def solve(regularizer: Regularizer, *arrays: jax.Array) -> jax.Array:
        metric, weight, direction, centre, start = arrays
        sub = Subproblem(direction, metric, centre, (weight * strength).astype(direction.dtype))
        return solver.solve(regularizer, sub, start.astype(direction.dtype))

    points: dict[int, jax.Array] = {}
    for i, (sub, regularizer, _) in enumerate(problems):
        if regularizer is None:
            points[i] = unpenalised(sub)
    coupled: list[Joint] = []  # what takes more than one pass over the leaf
    works: list[Work] = []
    for joint in joined([x.regularizer for x in problems], [x.sub.shape for x in problems]):
        held, arrays = _posed(joint, problems)
        if joint.regularizer.coupled_axes(len(arrays[0].shape)):
            coupled.append(joint)
            works.append(Work(joint.regularizer, held, arrays))
        else:
            points |= joint.leaves(solve(joint.regularizer, *map(made, (*held, *arrays))))
    for joint, found in zip(coupled, in_turn(solve, works), strict=True):
        points |= joint.leaves(found)
    return [points[i] for i in range(len(problems))]


def _posed(joint: Joint, problems: list[Problem]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Metric and weight, then direction, centre and start, of leaves that share norms as one."""
    here = {i: problems[i] for i in joint.places}
    first = here[joint.places[0]].sub
    starts = {i: x.params if x.sub.start is None else x.sub.start for i, x in here.items()}
    if not joint.parts:
        return (first.metric, first.weight), (first.direction, first.centre, *starts.values())
    metric = made(first.metric)
    if metric.ndim:
        metrics = {i: made(x.sub.metric) for i, x in here.items()}
        whole = {i: jnp.broadcast_to(x, here[i].sub.shape) for i, x in metrics.items()}
        metric = joint.matrix(whole)
    directions = {i: made(x.sub.direction) for i, x in here.items()}
    centres = {i: made(x.sub.centre) for i, x in here.items()}
    begun = {i: made(x) for i, x in starts.items()}
    return (metric, first.weight), tuple(joint.matrix(x) for x in (directions, centres, begun))


def _check_weight(sub: Subproblem | None, weight: Any, spec: Regularizer | None) -> None:
    if sub is not None and weight is not None:
        raise ValueError(
            "prox_step got weight=... after dual_averaging or moving_average, which bring their "
            "own: leave it out"
        )
    if sub is None and weight is None and spec is not None:
        raise ValueError(
            "prox_step after a plain optax transformation needs weight=..., its learning rate "
            "(number or schedule): the threshold is weight * strength"
        )


def _around_plain(u: jax.Array, p: jax.Array, weight: Any) -> Subproblem:
    """The prox of W + u in the Euclidean metric, as a subproblem."""
    dtype = wide_dtype(u, p)
    return Subproblem(-u.astype(dtype), jnp.ones((), dtype), p.astype(dtype), weight)
