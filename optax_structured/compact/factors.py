"""A kernel in two factors on its way through a program: slices, moves, products, convolutions."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from optax_structured.compact import families
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Sets
from optax_structured.compact.slices import take
from optax_structured.trees import Axes
from optax_structured.weights import Factors

# What takes factors as they are. All others get the product.
TAKEN = frozenset(
    """conv_general_dilated convert_element_type dot_general reshape slice squeeze
    transpose""".split()
)


def is_factors(x: Any) -> bool:
    return isinstance(x, Factors)


def sliced(x: Factors, kept: Sets, sets: Sets) -> Factors:
    """The factors of some slices, by their original numbers."""
    batch, rows, columns = x.axes.split(x.shape)
    shape = tuple(map(len, sets))
    parts = []
    for array, axes in ((x.left, (*batch, *rows, None)), (x.right, (*batch, None, *columns))):
        part = array.reshape([array_rank(x) if k is None else x.shape[k] for k in axes])
        for place, k in enumerate(axes):
            if k is not None:
                part = take(part, place, kept[k], sets[k])
        parts.append(part)
    left, right = parts
    outer = [shape[k] for k in batch]
    left = left.reshape(*outer, -1, array_rank(x))
    return Factors(left, right.reshape(*outer, array_rank(x), -1), x.axes, shape)


def array_rank(x: Factors) -> int:
    """The rank of the product."""
    return int(x.left.shape[-1])


def converted(equation: Equation, x: Factors) -> Factors:
    """Both factors in another type."""
    left, right = (equation.run([array])[0] for array in (x.left, x.right))
    return Factors(left, right, x.axes, x.shape)


def transposed(x: Any, permutation: Sequence[int]) -> Any:
    """An array or factors with axes in another order."""
    if not is_factors(x):
        return lax.transpose(x, permutation)
    order = list(permutation)
    batch, rows, columns = ([order.index(k) for k in axes] for axes in x.axes.split(x.shape))
    if batch != sorted(batch):
        return lax.transpose(x.merged(), permutation)
    shape = tuple(x.shape[k] for k in order)
    return Factors(x.left, x.right, Axes(tuple(rows), tuple(columns)), shape)


def reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    """An array or factors in another shape; the product if rows meet columns."""
    if not is_factors(x):
        return lax.reshape(x, shape)
    now = [[k for k in axes if x.shape[k] != 1] for axes in x.axes.split(x.shape)]
    then: list[list[int]] = [[], [], []]
    for before, after in families.factors(x.shape, shape):
        side = next(n for n, axes in enumerate(now) if before[0] in axes)
        if now[side][: len(before)] != before:  # from other sides, or in another order
            return lax.reshape(x.merged(), shape)
        del now[side][: len(before)]
        then[side] += after
    _, rows, columns = then
    if not rows or not columns:
        return lax.reshape(x.merged(), shape)
    outer = [n for k, n in enumerate(shape) if k not in (*rows, *columns)]
    left, right = (array.reshape(*outer, *array.shape[-2:]) for array in (x.left, x.right))
    return Factors(left, right, Axes(tuple(rows), tuple(columns)), shape)


def of_step(x: Any) -> Any:
    """What a loop hands to one step: factors without their first axis, which is a batch axis."""
    if not is_factors(x):
        return x
    _, rows, columns = x.axes.split(x.shape)
    axes = Axes(tuple(k - 1 for k in rows), tuple(k - 1 for k in columns))
    return Factors(x.left, x.right, axes, x.shape[1:])


def in_steps(x: Any) -> Any:
    """A stack of factors, or the product if they are not stacked along the first axis."""
    return x if not is_factors(x) or 0 in x.axes.split(x.shape)[0] else x.merged()


def _sides(x: Factors, first: Sequence[int]) -> tuple[Any, Any, list[int]] | None:
    """(*batch, *first, rank), (*batch, rank, *others), and the first axes in their order."""
    batch, rows, columns = x.axes.split(x.shape)
    left = x.left.reshape(*(x.shape[k] for k in (*batch, *rows)), -1)
    right = x.right.reshape(*(x.shape[k] for k in batch), -1, *(x.shape[k] for k in columns))
    n = len(batch)
    if sorted(columns) == sorted(first):
        left, right = jnp.moveaxis(right, n, -1), jnp.moveaxis(left, -1, n)
        rows, columns = columns, rows
    if sorted(rows) != sorted(first):
        return None
    order = sorted(range(len(columns)), key=columns.__getitem__)
    right = right.transpose(*range(n + 1), *(n + 1 + k for k in order))
    return left, right, list(rows)


def product(equation: Equation, operands: Sequence[Any]) -> Any:
    """A product of data with a kernel in two factors."""
    i = next(k for k, x in enumerate(operands) if is_factors(x))
    kernel, data = operands[i], operands[1 - i]
    summed, batch = equation.params["dimension_numbers"]
    sides = _sides(kernel, summed[i])
    if sides is None or kernel.axes.split(kernel.shape)[0] != tuple(batch[i]):
        whole = [x.merged() if is_factors(x) else x for x in operands]
        return equation.run(whole)[0]
    left, right, rows = sides
    settings = {k: equation.params[k] for k in ("precision", "preferred_element_type")}
    outer = tuple(range(len(batch[i])))
    mine = tuple(len(outer) + k for k in range(len(rows)))
    its = tuple(summed[1 - i][summed[i].index(k)] for k in rows)
    small = lax.dot_general(data, left, ((its, mine), (batch[1 - i], outer)), **settings)
    small = small.astype(right.dtype)
    ends = (small.ndim - 1,), (len(outer),)
    if i == 1:
        return lax.dot_general(small, right, (ends, (outer, outer)), **settings)
    return lax.dot_general(right, small, (ends[::-1], (outer, outer)), **settings)


def convolution(equation: Equation, data: Any, kernel: Factors) -> Any:
    """Features first and then the window, or the window to few features and then all of them."""
    c = families.convolution(equation)
    assert c is not None
    settings = {k: equation.params[k] for k in ("precision", "preferred_element_type")}

    def features(x: Any, axis: int, matrix: Any) -> Any:
        made = lax.dot_general(x, matrix, (((axis,), (0,)), ((), ())), **settings)
        return jnp.moveaxis(made, -1, axis).astype(data.dtype)

    def window(x: Any, part: Any) -> Any:
        return equation.run([x, part], feature_group_count=1)[0]

    if (sides := _sides(kernel, [c.kernel_in])) is not None:
        first, second, _ = sides
        return window(features(data, c.feature, first), jnp.moveaxis(second, 0, c.kernel_in))
    others = [k for k in range(len(kernel.shape)) if k != c.kernel_out]
    if (sides := _sides(kernel, others)) is None:
        return window(data, kernel.merged())
    first, second, rows = sides
    first = first.transpose(*(rows.index(k) for k in others), len(rows))
    thin = window(data, jnp.moveaxis(first, -1, c.kernel_out))
    made = features(thin.astype(data.dtype), c.out_feature, second)
    return made.astype(thin.dtype)
