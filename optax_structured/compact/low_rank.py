"""Kernels of low rank as two factors, where two small products cost less than one."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_structured.compact import families
from optax_structured.compact.plan import Plan
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import sizes
from optax_structured.trees import Axes
from optax_structured.weights import Factors

Labels = frozenset[int]  # axes of a leaf
Split = frozenset[Labels]  # what is summed over, and the others


class View(NamedTuple):
    """A value that holds the entries of a leaf, or some of them."""

    leaf: int
    axes: tuple[Labels, ...]  # of the leaf, that each axis is made of


class Read(NamedTuple):
    """What a product with a kernel costs, in multiplications."""

    whole: float
    factors: Mapping[Split, float]  # for each unit of rank; empty: only the product will do


def factored(plan: Plan, leaves: Sequence[Any]) -> list[Any]:
    """Leaves that are cut, as `Factors` where their rank is so low that this saves operations.

    A product of a row with (m, n) takes m n multiplications, with factors of rank k it takes
    k (m + n). A convolution is split before or after its window, wherever fewer are left. The
    kernels of stacked layers and other batches have one rank, the largest.
    """
    views = {
        v: View(i, tuple(frozenset({k}) for k in range(x.ndim)))
        for i, (v, x) in enumerate(zip(plan.program.inputs, leaves, strict=False))
        if plan.kept[v] is not None and x.size and jnp.issubdtype(x.dtype, jnp.floating)
    }
    found: dict[int, list[Read]] = collections.defaultdict(list)
    _follow(plan, views, 1, found)
    return [_cheaper(x, found[i]) if i in found else x for i, x in enumerate(leaves)]


def _cheaper(leaf: Any, reads: Sequence[Read]) -> Any:
    splits = set.intersection(*(set(read.factors) for read in reads))
    best, cost = leaf, sum(read.whole for read in reads)
    for split in sorted(splits, key=lambda split: sorted(map(sorted, split))):
        rate = sum(read.factors[split] for read in reads)
        rows, columns = sorted(map(sorted, split))
        axes = Axes(tuple(rows), tuple(columns))
        matrix = np.asarray(axes.to_matrix(leaf), np.float64)
        rank = _rank(matrix, float(jnp.finfo(leaf.dtype).eps))
        if 0 < rank * rate < cost:
            best, cost = _in_two(matrix, rank, axes, leaf), rank * rate
    return best


def _rank(matrix: np.ndarray, eps: float) -> int:
    """The largest of a stack; without what rounding of the entries leaves of a zero."""
    if not np.isfinite(matrix).all():
        return min(matrix.shape[-2:])
    s = np.linalg.svd(matrix, compute_uv=False)
    smallest = eps * np.sqrt((s * s).sum(-1, keepdims=True))
    return int((s > smallest).sum(-1).max(initial=0))


def _in_two(matrix: np.ndarray, rank: int, axes: Axes, leaf: Any) -> Factors:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[..., :rank])
    left = jnp.asarray(u[..., :rank] * root[..., None, :], leaf.dtype)
    right = jnp.asarray(root[..., None] * vt[..., :rank, :], leaf.dtype)
    return Factors(left, right, axes, leaf.shape)


def _follow(plan: Plan, views: dict[int, View], times: int, found: dict[int, list[Read]]) -> None:
    """Adds what reads the leaves, through moves and into the bodies of loops."""
    program = plan.program
    for place in plan.run:
        equation = program.equations[place]
        here = [(i, views[v]) for i, v in enumerate(equation.inputs) if v in views]
        if place in plan.loops:
            body, loop = plan.loops[place]
            inside = {}
            for i, view in here:
                v = body.program.inputs[i]
                if i < body.fixed:
                    inside[v] = view
                elif i >= body.fixed + body.carried:
                    inside[v] = View(view.leaf, view.axes[1:])
                else:
                    found[view.leaf].append(Read(0, {}))
            _follow(loop.plan, inside, times * equation.params["length"], found)
            continue
        for i, view in here:
            if (axes := _moved(equation, program.shape(equation.inputs[i]), view.axes)) is not None:
                views[equation.outputs[0]] = View(view.leaf, axes)
            else:
                read = _read(plan, equation, i, view.axes)
                factors = {split: times * cost for split, cost in read.factors.items()}
                found[view.leaf].append(Read(times * read.whole, factors))
    for v in program.outputs:
        if v in views:
            found[views[v].leaf].append(Read(0, {}))


def _moved(
    equation: Equation, before: tuple[int, ...], axes: tuple[Labels, ...]
) -> tuple[Labels, ...] | None:
    """The axes of the result, if the equation moves entries of its operand."""
    params = equation.params
    if equation.name in ("convert_element_type", "slice"):
        return axes
    if equation.name == "transpose":
        return tuple(axes[k] for k in params["permutation"])
    if equation.name == "squeeze":
        gone = {k % len(axes) for k in params["dimensions"]}
        return tuple(labels for k, labels in enumerate(axes) if k not in gone)
    if equation.name == "reshape":
        made = [Labels()] * len(params["new_sizes"])
        for ins, outs in families.factors(before, tuple(params["new_sizes"])):
            for k in outs:
                made[k] = Labels().union(*(axes[i] for i in ins))
        return tuple(made)
    return None


def _read(plan: Plan, equation: Equation, i: int, axes: tuple[Labels, ...]) -> Read:
    """The cost of a product of data with a kernel."""
    kernel, other = equation.inputs[i], equation.inputs[1 - i] if len(equation.inputs) == 2 else -1
    known = equation.name in ("dot_general", "conv_general_dilated")
    if not known or other == kernel or plan.facts[other].of_params:
        return Read(0, {})
    shape, data, out = (_size(plan, v) for v in (kernel, other, equation.outputs[0]))

    def split(first: Sequence[int], second: Sequence[int]) -> Split | None:
        one, two = (Labels().union(*(axes[k] for k in side)) for side in (first, second))
        return None if one & two or not one or not two else frozenset({one, two})

    costs: dict[Split | None, float] = {}
    if equation.name == "dot_general":
        summed, batch = (side[i] for side in equation.params["dimension_numbers"])
        rest = [k for k in range(len(shape)) if k not in (*summed, *batch)]
        m, n = (math.prod(shape[k] for k in side) for side in (summed, rest))
        whole = math.prod(out) * m
        if list(batch) == sorted(batch) and n:
            costs[split(summed, rest)] = math.prod(out) // n * (m + n)
    else:
        c = families.convolution(equation)
        if c is None or c.groups != 1 or i != 1:
            return Read(0, {})
        inputs, outputs, total = shape[c.kernel_in], shape[c.kernel_out], math.prod(shape)
        there = math.prod(n for k, n in enumerate(out) if k != c.out_feature)
        here = math.prod(n for k, n in enumerate(data) if k != c.feature)
        whole = there * total
        others = [k for k in range(len(shape)) if k != c.kernel_out]
        costs[split(others, [c.kernel_out])] = there * (total // outputs + outputs)
        others = [k for k in range(len(shape)) if k != c.kernel_in]
        costs[split(others, [c.kernel_in])] = here * inputs + there * (total // inputs)
    return Read(whole, {key: cost for key, cost in costs.items() if key is not None})


def _size(plan: Plan, v: int) -> tuple[int, ...]:
    kept = plan.kept.get(v)
    return plan.program.shape(v) if kept is None else sizes(kept)
