"""Which entries vary with the inputs: one rule a family, from the operands to the results."""

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from optax_structured.compact import families
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Mask, Shape
from optax_structured.compact.sources import sources


class Source(enum.IntEnum):
    """What a value is computed from; of several, the last."""

    CONSTANTS, PARAMS, INPUTS = range(3)


class Fact(NamedTuple):
    """What is known of a value for all inputs of the function."""

    varies: Mask  # false: this entry is the same for all inputs
    nonzero: Mask  # false: it is exactly zero for all inputs
    source: Source
    value: np.ndarray | None  # in one run; None: of a type without numbers, as random keys

    @property
    def of_params(self) -> bool:
        """Whether no input takes part."""
        return self.source is not Source.INPUTS


Rule = Callable[[Equation, Sequence[Fact], Sequence[Shape]], list[Mask]]


def varying(equation: Equation, operands: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    """The entries of each result that may vary."""
    if not any(x.varies.any() for x in operands) and not equation.has_effects:
        return [np.zeros(shape, bool) for shape in after]
    return _rule(equation.name)(equation, operands, after)


def _anything(equation: Equation, operands: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    return [np.ones(shape, bool) for shape in after]


def _elementwise(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    found = np.zeros(after[0], bool)
    for operand in x:
        found = found | operand.varies
    return [found]


def _product(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    a, b = x
    found = (a.varies & b.nonzero) | (a.nonzero & b.varies)
    return [np.broadcast_to(found, after[0])]


def _moved(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    flat = np.concatenate([operand.varies.ravel() for operand in x])
    where = sources(equation, [operand.varies.shape for operand in x], after)
    return [flat[place] for place in where]


def _reduced(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    return [np.asarray(x[0].varies.any(axis=tuple(equation.params["axes"])))]


def _along(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    results = []
    for shape in after:
        found = np.zeros(shape, bool)
        for operand in x:
            mask = operand.varies
            if mask.ndim:
                axes = families.mixed_axes(equation, mask.shape, x[0].varies.shape)
                axes |= families.mixed_axes(equation, x[0].varies.shape, shape)
                mask = np.asarray(mask.any(axis=tuple(axes), keepdims=True))
            found = found | mask
        results.append(found)
    return results


def _dot(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    (a, b), d = x, families.dot(equation, x[0].varies.shape, x[1].varies.shape)
    first = families.product(d.left, d.right, d.out, a.varies, b.nonzero)
    return [first | families.product(d.left, d.right, d.out, a.nonzero, b.varies)]


def _convolution(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    a, b, c = *x, families.convolution(equation)
    if c is None:
        return _anything(equation, x, after)
    found = families.product(
        "ngi", "goi", "ngo", c.inputs(a.varies), c.kernel(b.nonzero)
    ) | families.product("ngi", "goi", "ngo", c.inputs(a.nonzero), c.kernel(b.varies))
    features = found.reshape(len(found), -1)
    return [families.spread(features, c.out_batch, c.out_feature, after[0])]


def _gather(equation: Equation, x: Sequence[Fact], after: Sequence[Shape]) -> list[Mask]:
    operand, indices = x
    through = families.gather(equation, operand.varies.shape)
    mask = operand.nonzero if indices.varies.any() else operand.varies
    rest = tuple(k for k in range(mask.ndim) if k not in through.axes)
    view = np.ones(len(after[0]), int)
    view[list(through.out)] = [mask.shape[k] for k in through.axes]
    return [np.broadcast_to(mask.any(axis=rest).reshape(view), after[0])]


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


def _rule(name: str) -> Rule:
    return _RULES.get(name, _anything)


def is_known(name: str) -> bool:
    """Whether a rule says more of this primitive than that it keeps everything."""
    return name in _RULES
