"""What constant slices add to a product with parameters: computed once, so they can go."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_structured.compact import families
from optax_structured.compact.forward import Fact
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Mask, block, hull


class Folded(NamedTuple):
    """A product whose constant slices were taken out of its sum."""

    operands: list[Fact]  # with zeros where those slices were
    constant: np.ndarray  # what they add to the result, of length 1 where it repeats


def fold(equation: Equation, operands: list[Fact]) -> Folded | None:
    """Takes constant slices out of a sum over products with parameters; None if there are none.

    Only where they add the same to all rows, images and positions. So it is not at the border of a
    padded convolution: the slices then stay in its sum, and only what makes them is cut.
    """
    if equation.name == "dot_general":
        for i in (0, 1):
            data, weight = operands[i], operands[1 - i]
            if not data.of_params and weight.of_params:
                return _fold_dot(equation, operands, i)
    if equation.name == "conv_general_dilated" and families.convolution(equation) is not None:
        if not operands[0].of_params and operands[1].of_params:
            return _fold_convolution(equation, operands)
    return None


def _fold_dot(equation: Equation, operands: list[Fact], i: int) -> Folded | None:
    d = families.dot(equation, operands[0].varies.shape, operands[1].varies.shape)
    data, weight = operands[i], operands[1 - i]
    mine, its = (d.left, d.right) if i == 0 else (d.right, d.left)
    other = tuple(k for k, x in enumerate(mine) if x not in d.summed)
    order = [x for x in mine if x in d.summed]
    varies = data.varies.any(axis=other)
    alive = weight.nonzero.any(axis=tuple(k for k, x in enumerate(its) if x not in d.summed))
    alive = np.transpose(alive, [[x for x in its if x in d.summed].index(x) for x in order])
    left_in = block(varies.shape, hull(varies & alive))
    view = [n if x in d.summed else 1 for x, n in zip(mine, data.varies.shape, strict=True)]
    out = ~left_in.reshape(view) & data.nonzero & ~data.varies
    if not out.any() or data.value is None or weight.value is None:
        return None
    part = np.where(out, data.value, 0)
    kind = complex if part.dtype.kind == "c" else float
    constant = np.einsum(
        f"{mine},{its}->{d.out}", part.astype(kind), weight.value.astype(kind), optimize=True
    )
    axes = [k for k, x in enumerate(d.out) if x in mine]
    return _checked(operands, i, out, constant, axes)


def _fold_convolution(equation: Equation, operands: list[Fact]) -> Folded | None:
    data, weight = operands
    c = families.convolution(equation)
    assert c is not None
    other = tuple(k for k in range(data.varies.ndim) if k != c.feature)
    view = [n if k == c.feature else 1 for k, n in enumerate(data.varies.shape)]
    still = ~data.varies.any(axis=other).reshape(view) & data.nonzero
    if not still.any() or data.value is None or weight.value is None:
        return None
    part = jnp.asarray(np.where(still, data.value, 0))
    constant = np.asarray(equation.run([part, jnp.asarray(weight.value)])[0])
    axes = [k for k in range(constant.ndim) if k != c.out_feature]
    return _checked(operands, 0, still, constant, axes)


def _checked(
    operands: list[Fact], i: int, out: Mask, constant: Any, axes: list[int]
) -> Folded | None:
    rtol = 1e-12 if constant.dtype.itemsize >= 8 else 1e-6
    for k in axes:
        first = constant.take([0], axis=k)
        if not np.allclose(constant, first, rtol=rtol, atol=0):
            return None
        constant = first
    changed = list(operands)
    changed[i] = operands[i]._replace(nonzero=operands[i].nonzero & ~out)
    return Folded(changed, constant)
