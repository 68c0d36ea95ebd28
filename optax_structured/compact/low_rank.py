"""Kernels of low rank as two factors, where two small products cost less than one."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_structured.compact.plan import Plan
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Sets
from optax_structured.compact.slices import take
from optax_structured.trees import Axes
from optax_structured.weights import Factors


def is_factors(x: Any) -> bool:
    return isinstance(x, Factors)


def factored(plan: Plan, leaves: Sequence[Any]) -> list[Any]:
    """Leaves that are cut, as `Factors` where their rank is so low that this saves operations.

    For each row of the other operand a product with (m, n) takes m n multiplications, with factors
    of rank k it takes k (m + n). Only kernels that one matrix product reads, directly.
    """
    return [_factored(plan, v, leaf) for v, leaf in zip(plan.program.inputs, leaves, strict=False)]


def _factored(plan: Plan, v: int, leaf: Any) -> Any:
    axes = _matrix_axes(plan, v, leaf.ndim)
    if axes is None or not leaf.size or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    m, n = axes.matrix_shape(leaf.shape)
    matrix = np.asarray(axes.to_matrix(leaf), np.float64)
    if not np.isfinite(matrix).all():
        return leaf
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    # What rounding leaves of a singular value that is zero, as `np.linalg.matrix_rank` has it.
    rank = int((s > s[0] * max(m, n) * jnp.finfo(leaf.dtype).eps).sum())
    if not 0 < rank * (m + n) < m * n:
        return leaf
    root = np.sqrt(s[:rank])
    left = jnp.asarray(u[:, :rank] * root, leaf.dtype)
    right = jnp.asarray(root[:, None] * vt[:rank], leaf.dtype)
    return Factors(left, right, axes, leaf.shape)


def _matrix_axes(plan: Plan, v: int, ndim: int) -> Axes | None:
    """Summed axes as rows, the others as columns, if one product of kernel and data reads it."""
    program = plan.program
    readers = [e for place in plan.run if v in (e := program.equations[place]).inputs]
    if len(readers) != 1 or readers[0].name != "dot_general" or v in program.outputs:
        return None
    (equation,) = readers
    i = equation.inputs.index(v)
    (summed, batch) = equation.params["dimension_numbers"]
    if batch[i] or equation.inputs[1 - i] == v or plan.facts[equation.inputs[1 - i]].of_params:
        return None
    rest = tuple(k for k in range(ndim) if k not in summed[i])
    return Axes(tuple(summed[i]), rest) if summed[i] and rest else None


def sliced(factors: Factors, kept: Sets, sets: Sets) -> Factors:
    """The factors of some slices, by their original numbers."""
    _, rows, columns = factors.axes.split(factors.shape)
    shape = [len(s) for s in sets]
    left = factors.left.reshape(*(factors.shape[k] for k in rows), -1)
    right = factors.right.reshape(-1, *(factors.shape[k] for k in columns))
    for i, k in enumerate(rows):
        left = take(left, i, kept[k], sets[k])
    for i, k in enumerate(columns):
        right = take(right, i + 1, kept[k], sets[k])
    rank = factors.left.shape[-1]
    left, right = left.reshape(-1, rank), right.reshape(rank, -1)
    return Factors(left, right, factors.axes, tuple(shape))


def product(equation: Equation, operands: list[Any]) -> Any:
    """A product of data with a kernel in two factors."""
    i = next(k for k, x in enumerate(operands) if isinstance(x, Factors))
    factors, data = operands[i], operands[1 - i]
    settings = {k: equation.params[k] for k in ("precision", "preferred_element_type")}
    _, rows, columns = factors.axes.split(factors.shape)
    summed = equation.params["dimension_numbers"][0]
    # Rows of the left factor are in the order in which the product sums.
    left = factors.left.reshape(*(factors.shape[k] for k in summed[i]), -1)
    right = factors.right.reshape(-1, *(factors.shape[k] for k in columns))
    numbers = (tuple(summed[1 - i]), tuple(range(len(rows)))), ((), ())
    small = lax.dot_general(data, left, numbers, **settings)
    last = small.ndim - 1
    if i == 1:
        return lax.dot_general(small, right, (((last,), (0,)), ((), ())), **settings)
    return lax.dot_general(right, small, (((0,), (last,)), ((), ())), **settings)
