"""The subproblems of all leaves, one after the other; small ones that are alike in one loop.

What a solver does to a leaf is some thirty kernels, and XLA compiles them again for every leaf. A
loop over leaves is compiled once. It reads them from copies, which is cheap for small leaves, of
which there are many; a large one is solved where it is. So is every leaf that may be sharded in a
way that its type does not show: a loop would move leaves to where the others are.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import on_explicit_mesh
from optax_structured.proximal.solvers import Solver
from optax_structured.proximal.subproblem import Subproblem
from optax_structured.regularizers.base import Regularizer
from optax_structured.xla.sequencing import zero_after

_LOOP_SIZE = 3 * 2**19  # entries of all leaves of a loop: copies fit the caches of a CPU


class Task(NamedTuple):
    """What is to be solved for one leaf."""

    sub: Subproblem
    regularizer: Regularizer | None
    warm: jax.Array  # like the leaf: where an iteration may start


def solve_in_turn(solver: Solver, tasks: list[Task], strength: jax.Array) -> list[jax.Array]:
    """The point of each task, like its leaf; `strength` is that of the regularizers, a scalar."""
    points: dict[int, jax.Array] = {}
    turn = jnp.zeros(())  # stays 0
    for numbers in _loops(tasks):
        first, *others = (tasks[i] for i in numbers)
        if others:
            found = _solve_loop(solver, [first, *others], strength, turn)
            points |= zip(numbers, found, strict=True)
        else:
            found = points[numbers[0]] = _solve(solver, first, strength, turn)
        if _is_coupled(first):
            turn = zero_after(found, turn)
    return [points[i] for i in range(len(tasks))]


def _is_coupled(task: Task) -> bool:
    """Whether the solution is more than one kernel."""
    return task.regularizer is not None and bool(task.regularizer.coupled_axes(task.sub.ndim))


def _loops(tasks: list[Task]) -> list[list[int]]:
    """The numbers of the tasks, those in one list that one loop can solve."""
    loops: list[list[int]] = []
    growing: dict[object, list[int]] = {}
    for i, task in enumerate(tasks):
        sub, regularizer, warm = task
        if not (_is_coupled(task) and _may_share(warm, sub.parts[0])):
            loops.append([i])
            continue
        arrays = (*sub.parts, sub.moment, warm)
        shared = (regularizer, sub.terms, sub.root, sub.weight)
        key = (*map(jax.typeof, arrays), *map(id, shared))
        loop = growing.get(key)
        if loop is None or (len(loop) + 1) * sub.size > _LOOP_SIZE:
            loop = growing[key] = []
            loops.append(loop)
        loop.append(i)
    return loops


def _may_share(warm: jax.Array, part: jax.Array) -> bool:
    """Whether a loop is compiled once, and moves no leaf to where the others live.

    Outside `jit` it would be compiled at every step; on automatic meshes types do not tell places.
    """
    placed = jax.device_count() == 1 or on_explicit_mesh(warm)
    return placed and isinstance(part, jax.core.Tracer)


def _solve_loop(
    solver: Solver, tasks: list[Task], strength: jax.Array, turn: jax.Array
) -> jax.Array:
    first = tasks[0]

    def stacked() -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        rows = [(task.sub.parts, task.sub.moment, task.warm) for task in tasks]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    def solve(row: tuple[tuple[jax.Array, ...], jax.Array, jax.Array]) -> jax.Array:
        parts, moment, warm = row
        sub = dataclasses.replace(first.sub, parts=parts, moment=moment)
        return _solve(solver, Task(sub, first.regularizer, warm), strength, turn)

    # A branch never taken, as `turn` is 0, so that the copies are made when it is their turn.
    return jax.lax.cond(
        turn < 0,
        lambda: first.sub.terms(*stacked()[0])[0],
        lambda: jax.lax.map(solve, stacked()),
    )


def _solve(solver: Solver, task: Task, strength: jax.Array, turn: jax.Array) -> jax.Array:
    sub, regularizer, warm = task
    (linear, centre), metric = sub.terms(*sub.parts), sub.root(sub.moment)
    if regularizer is None:
        return centre - linear / metric
    tau = (sub.weight * strength).astype(linear.dtype)
    if _is_coupled(task):
        tau, metric = tau + turn.astype(tau.dtype), _kept(metric, sub, turn)
    # A moving average is posed around the current, decayed, parameters: iterations start there.
    start = centre if sub.share is None else warm
    return solver.solve(regularizer, linear, metric, centre, tau, start)


def _kept(metric: jax.Array, sub: Subproblem, turn: jax.Array) -> jax.Array:
    """The metric, so written that XLA computes it once for all of a solver's readings of it.

    XLA repeats cheap arithmetic, such as our cube root, in each kernel that needs the result, but
    never a division by an unknown. It waits for `turn`, a 0: what one leaf needs is gone before
    the next one begins.
    """
    unit = jnp.ones(()) if sub.share is None else jnp.where(sub.weight > 0, sub.weight, 1.0)
    unit = (unit + turn).astype(metric.dtype)
    return (metric * unit) / unit
