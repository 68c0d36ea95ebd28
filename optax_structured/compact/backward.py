"""Which entries of the operands are needed for a block of the results: one rule a family."""

from collections.abc import Callable, Sequence

import numpy as np

from optax_structured.compact import families
from optax_structured.compact.forward import Fact
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Mask, Sets, Shape, block, everything, hull
from optax_structured.compact.sources import sources

Kept = Sequence[Sets | None]
Rule = Callable[[Equation, Kept, Sequence[Fact], Sequence[Shape]], list[Mask]]
Close = Callable[[Equation, Sets, Shape, Shape], Sets]


def needs(
    equation: Equation, kept: Kept, operands: Sequence[Fact], after: Sequence[Shape]
) -> list[Mask]:
    """The entries of each operand that the kept entries of the results are made from."""
    return _RULES.get(equation.name, _anything)(equation, kept, operands, after)


def closed(equation: Equation, kept: Sets, before: Shape, after: Shape) -> Sets:
    """The smallest block, with this one in it, that the primitive can make by itself."""
    return _CLOSE.get(equation.name, _whole if equation.name not in _RULES else _as_is)(
        equation, kept, before, after
    )


def _anything(
    equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]
) -> list[Mask]:
    return [np.ones(operand.varies.shape, bool) for operand in x]


def _elementwise(
    equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]
) -> list[Mask]:
    needed = block(after[0], kept[0])
    return [families.unrepeated(needed, operand.varies.shape) for operand in x]


def _product(
    equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]
) -> list[Mask]:
    needed = block(after[0], kept[0])
    factors = zip(x, (x[1], x[0]), strict=True)
    return [
        families.unrepeated(needed & other.nonzero, operand.varies.shape)
        for operand, other in factors
    ]


def _moved(equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    before = [operand.varies.shape for operand in x]
    flat = np.zeros(sum(operand.varies.size for operand in x), bool)
    for sets, where in zip(kept, sources(equation, before, after), strict=True):
        if sets is not None:
            flat[where[np.ix_(*sets)].ravel()] = True
    ends = np.cumsum([operand.varies.size for operand in x])
    parts = np.split(flat, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, before, strict=True)]


def _reduced(
    equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]
) -> list[Mask]:
    axes, shape = tuple(equation.params["axes"]), x[0].varies.shape
    return [np.broadcast_to(np.expand_dims(block(after[0], kept[0]), axes), shape)]


def _along(equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    whole = x[0].varies.shape
    results = []
    for operand in x:
        shape = operand.varies.shape
        found = np.zeros(shape, bool)
        for sets, out in zip(kept, after, strict=True):
            if sets is None:
                continue
            mask = block(out, sets)
            if shape:
                axes = families.mixed_axes(equation, shape, whole)
                axes |= families.mixed_axes(equation, whole, out)
                mask = np.asarray(mask.any(axis=tuple(axes), keepdims=True))
            found = found | (mask if shape else mask.any())
        results.append(found)
    return results


def _dot(equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    (a, b), d = x, families.dot(equation, x[0].varies.shape, x[1].varies.shape)
    needed = block(after[0], kept[0])
    return [
        families.product(d.out, d.right, d.left, needed, b.nonzero),
        families.product(d.left, d.out, d.right, a.nonzero, needed),
    ]


def _convolution(
    equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]
) -> list[Mask]:
    (a, b), c = x, families.convolution(equation)
    if c is None:
        return _anything(equation, kept, x, after)
    needed = c.outputs(block(after[0], kept[0]))
    left = families.product("ngo", "goi", "ngi", needed, c.kernel(b.nonzero))
    right = families.product("ngo", "ngi", "goi", needed, c.inputs(a.nonzero))
    shapes = a.varies.shape, b.varies.shape
    features = left.reshape(len(left), -1)
    kernel = right.reshape(-1, right.shape[2])
    return [
        families.spread(features, c.batch, c.feature, shapes[0]),
        families.spread(kernel, c.kernel_out, c.kernel_in, shapes[1]),
    ]


def _gather(
    equation: Equation, kept: Kept, x: Sequence[Fact], after: Sequence[Shape]
) -> list[Mask]:
    (operand, indices), needed = x, block(after[0], kept[0])
    shape = operand.varies.shape
    through = families.gather(equation, shape)
    mask = needed.any(axis=tuple(k for k in range(needed.ndim) if k not in through.out))
    view = [n if k in through.axes else 1 for k, n in enumerate(shape)]
    return [
        np.broadcast_to(mask.reshape(view), shape),
        np.ones(indices.varies.shape, bool),
    ]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(families.ELEMENTWISE, _elementwise),
    "mul": _product,
    "and": _product,
    **dict.fromkeys(families.MOVES, _moved),
    **dict.fromkeys(families.REDUCTIONS, _reduced),
    **dict.fromkeys(families.ALONG, _along),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}


def _as_is(equation: Equation, kept: Sets, before: Shape, after: Shape) -> Sets:
    return kept


def _whole(equation: Equation, kept: Sets, before: Shape, after: Shape) -> Sets:
    return everything(after)


def _whole_axes(equation: Equation, kept: Sets, before: Shape, after: Shape) -> Sets:
    mixed = families.mixed_axes(equation, before, after)
    return tuple(np.arange(n) if k in mixed else kept[k] for k, n in enumerate(after))


def _whole_groups(equation: Equation, kept: Sets, before: Shape, after: Shape) -> Sets:
    c = families.convolution(equation)
    if c is None:
        return everything(after)
    features = np.zeros(after[c.out_feature], bool)
    features[kept[c.out_feature]] = True
    grouped = features.reshape(c.groups, -1)
    sets = hull(grouped)
    alike = np.flatnonzero(block(grouped.shape, sets).ravel())
    return tuple(
        alike if k == c.out_feature else kept[k] if k == c.out_batch else np.arange(n)
        for k, n in enumerate(after)
    )


def _reshaped(equation: Equation, kept: Sets, before: Shape, after: Shape) -> Sets:
    return families.through_reshape(kept, after, before)[1]


def _gathered(equation: Equation, kept: Sets, before: Shape, after: Shape) -> Sets:
    through = families.gather(equation, before).out
    return tuple(kept[k] if k in through else np.arange(n) for k, n in enumerate(after))


_CLOSE: dict[str, Close] = {
    **dict.fromkeys(families.ALONG, _whole_axes),
    "conv_general_dilated": _whole_groups,
    "reshape": _reshaped,
    "gather": _gathered,
}
