r"""The prox point :math:`\hat W`, exactly structured long before its average :math:`W` is."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.proximal.averaging import DualAveragingState, averaged_subproblems
from optax_structured.proximal.preconditioners import (
    AdaptivePreconditionerState,
    in_cube_root_metric,
)
from optax_structured.proximal.prox_step import Problem, ProxStepState, solve_all
from optax_structured.proximal.solvers import Exact, Solver
from optax_structured.quantization.codec import is_encoded
from optax_structured.regularizers.base import Regularizer
from optax_structured.states.roles import Point
from optax_structured.trees import Rules, resolve
from optax_structured.trees.checks import check_params


def prox_point(
    state: Any,
    regularizer: Regularizer | Rules | None = None,
    *,
    solver: Solver = Exact(),  # noqa: B008  (frozen)
) -> Any:
    r"""The prox point :math:`\hat W` of the last step, read from an optimizer state.

    The sums of `dual_averaging` pose the subproblem of the last step; solving it again gives its
    point, so that no copy need be kept. A point that `record_point` kept is returned unchanged.

    Args:
      state: of `ramda`, `rmda` or a chain of their elements, or of a chain with `record_point`,
        however deeply wrapped (chain, partition, masked, MultiSteps, restart_at, ...).
      regularizer: the one that the recipe was built with, or the same `rules`.
      solver: of the subproblem, from zero. The point of an inexact one depends on where a step
        started: to have that very point, keep it (`keep_point=True`, `record_point`).

    Returns:
      A tree like the parameters, float32 at least; where a chain has no such state, as under
      `optax.partition`, it has `optax.MaskedNode`.

    Raises:
      ValueError: `state` has neither sums nor a recorded point, or it has sums and `regularizer`
        is missing.

    Equals the parameters for a momentum of 0.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.ramda(0.01, oxs.L1(), 2.0, momentum=0.9)
      >>> params = jnp.array([1.0, 0.001])
      >>> updates, state = optimizer.update(jnp.ones(2), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates) != 0)
      [ True  True]
      >>> print(oxs.prox_point(state, oxs.L1()) != 0)
      [ True False]
    """
    nodes = [n for n in jax.tree.leaves(state, is_leaf=_tells_the_point) if _tells_the_point(n)]
    points = [node.point for node in nodes if isinstance(node, PointState)]
    if not points:
        points = [_solved(*sums, regularizer, solver) for sums in _chains(nodes)]
    if not points:
        raise ValueError(
            "the state holds no prox point: neither the sums of ramda or rmda nor a point kept by "
            "record_point. The other recipes keep none, since their parameters are the prox point "
            "(of prox_sgd_relaxed: keep_point=True)"
        )
    merged = points[0]
    for point in points[1:]:  # under optax.partition each part has its own leaves
        merged = jax.tree.map(
            lambda a, b: b if _is_masked(a) else a, merged, point, is_leaf=_is_masked
        )
    return merged


class PointState(NamedTuple):
    """State of `record_point`."""

    point: Point[Any]  # like params: the prox point of the last step, the initial params before


def record_point() -> optax.GradientTransformationExtraArgs:
    r"""Keeps the prox point :math:`\hat W` of the last step in the state, for `prox_point`.

    For chains whose point cannot be computed from the state: with an inexact solver, with the sums
    in codes (`quantized`), or around the current parameters (`prox_sgd_relaxed`). Stands between
    `prox_step` and the `optax.scale` of momentum, where :math:`\hat W` is the parameters plus the
    update. Costs one copy of the parameters, in their dtype.

    Returns:
      An element that passes updates through and needs `params`. Its state is `PointState`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = optax.chain(
      ...     oxs.moving_average(0.1), oxs.prox_step(oxs.L1(), 0.5), oxs.proximal.record_point(),
      ...     optax.scale(0.5))
      >>> params = jnp.array([1.0, 0.001])
      >>> _, state = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
      >>> print(oxs.prox_point(state) != 0)
      [ True False]
    """

    def init(params: Any) -> PointState:
        copied = lambda p: jnp.array(p, jnp.result_type(p), copy=True)  # noqa: E731
        return PointState(jax.tree.map(copied, params))

    def update(
        updates: Any, state: PointState, params: Any = None, **_: Any
    ) -> tuple[Any, PointState]:
        check_params("record_point", params)
        point = optax.apply_updates(params, updates)
        return updates, PointState(jax.tree.map(lambda w, p: w.astype(p.dtype), point, state.point))

    return optax.GradientTransformationExtraArgs(init, update)


_Sums = tuple[DualAveragingState, AdaptivePreconditionerState | None, ProxStepState]


def _tells_the_point(node: Any) -> bool:
    states = (DualAveragingState, AdaptivePreconditionerState, ProxStepState, PointState)
    return isinstance(node, states)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _chains(nodes: list[Any]) -> Iterator[_Sums]:
    """The states of each chain that begins with `dual_averaging`: they lie in its order."""
    sums: DualAveragingState | None = None
    squares: AdaptivePreconditionerState | None = None
    for node in nodes:
        if isinstance(node, DualAveragingState):
            sums, squares = node, None
        elif isinstance(node, AdaptivePreconditionerState):
            squares = node
        elif isinstance(node, ProxStepState) and sums is not None:
            yield sums, squares, node
            sums = None


def _solved(
    sums: DualAveragingState,
    squares: AdaptivePreconditionerState | None,
    last: ProxStepState,
    regularizer: Regularizer | Rules | None,
    solver: Solver,
) -> Any:
    if regularizer is None:
        raise ValueError(
            "prox_point solves the subproblem of the state again and needs the regularizer (or "
            "the rules) that the recipe was built with: prox_point(state, regularizer)"
        )
    if any(map(is_encoded, jax.tree.leaves((sums, squares), is_leaf=is_encoded))):
        raise ValueError(
            "the sums of this state are in the codes of quantized, which do not tell the prox "
            "point: build the recipe with keep_point=True, or put record_point() after prox_step"
        )
    subproblems = averaged_subproblems(sums, sums.gradient_sum)
    if squares is not None:
        subproblems = in_cube_root_metric(subproblems, squares.square_sum, squares.eps)
    structure: Any = jax.tree.structure(sums.anchor)
    problems = [
        Problem(sub, spec, jnp.zeros_like(sub.direction))
        for sub, spec in zip(
            structure.flatten_up_to(subproblems), resolve(regularizer, sums.anchor), strict=True
        )
    ]
    return structure.unflatten(solve_all(solver, problems, last.strength))
