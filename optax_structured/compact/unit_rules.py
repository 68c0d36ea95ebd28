"""How units pass through a program: one rule a family of primitives."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.compact import families, unit_moves
from optax_structured.compact.forward import Source
from optax_structured.compact.program import Equation, Program, flat
from optax_structured.compact.sets import Shape
from optax_structured.compact.units import Axis, Read, Units, Value, fixed, free

Rule = Callable[[Units, Equation, list[Value], list[Shape], list[Shape]], list[Value]]


def run(units: Units, program: Program, inputs: Sequence[Value]) -> list[Value]:
    """The units of the outputs, from those of the inputs."""
    values: dict[int, Value] = dict(zip(program.inputs, inputs, strict=True))
    for v, value in program.constants.items():
        values[v] = free(program.shape(v), Source.CONSTANTS, _number(value))
    for equation in program.equations:
        units.doing = equation.name
        operands = [values[v] for v in equation.inputs]
        before = [program.shape(v) for v in equation.inputs]
        after = [program.shape(v) for v in equation.outputs]
        made = _apply(units, equation, operands, before, after)
        values.update(zip(equation.outputs, made, strict=True))
    return [values[v] for v in program.outputs]


def _number(value: Any) -> float | None:
    """Of a constant that is the same everywhere."""
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended) or not np.size(value):
        return None  # a random key
    first = np.ravel(value)[0]
    return float(first.real) if (np.asarray(value) == first).all() else None


def _apply(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    source = max((value.source for value in x), default=Source.CONSTANTS)
    if source is Source.CONSTANTS and not equation.has_effects:
        same = equation.name in ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze")
        return [free(shape, source, x[0].number if same else None) for shape in after]
    if source is Source.INPUTS and equation.name not in _MARKING:
        for value in x:
            if value.source is Source.PARAMS:
                _written(units, *value.axes)
    return _RULES.get(equation.name, _anything)(units, equation, x, before, after)


def _written(units: Units, *axes: Axis) -> None:
    for axis in axes:
        if axis.labels is not None:
            units.written.update(axis.labels.tolist())


def _anything(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    for value in x:
        for axis in value.axes:
            units.stay(axis)
    return [fixed(shape) for shape in after]


def _source(x: Sequence[Value]) -> Source:
    return max(value.source for value in x)


def _elementwise(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    axes = []
    for k, n in enumerate(after[0]):
        labels, zero = None, []
        for value, shape in zip(x, before, strict=True):
            axis = value.axes[k] if shape else Axis(None)
            if shape and shape[k] != n:  # repeated
                units.stay(axis)
                axis = Axis(None)
            labels = units.merge(labels, axis.labels)
            zero.append(axis.zero or value.number == 0)
        axes.append(Axis(labels, labels is not None and _is_zero(equation, x, zero)))
    return [Value(tuple(axes), _source(x))]


def _is_zero(equation: Equation, x: list[Value], zero: list[bool]) -> bool:
    """Whether the result is zero where these operands are."""
    if not any(zero):
        return False
    if equation.name in ("mul", "and"):
        return True
    if equation.name == "div":
        return zero[0] and not zero[1]
    if equation.name == "select_n":
        return all(zero[1:])
    numbers = [0.0 if z else value.number for z, value in zip(zero, x, strict=True)]
    if None in numbers or equation.name in ("atan2", "pow", "rem", "nextafter"):
        return False
    if equation.name in ("not", "or", "xor"):
        return False
    return not np.asarray(equation.run([np.float32(n) for n in numbers])[0]).any()


def _dot(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    (a, b), d = x, families.dot(equation, before[0], before[1])
    left, right = dict(zip(d.left, a.axes, strict=True)), dict(zip(d.right, b.axes, strict=True))
    for s in d.summed:
        _sum(units, left[s], right[s], a.source, b.source)
    axes = []
    for s in d.out:
        first, second = left.get(s, Axis(None)), right.get(s, Axis(None))
        zero = first.zero or second.zero
        axes.append(Axis(units.merge(first.labels, second.labels), zero))
        for axis, own, other in ((first, a, b), (second, b, a)):
            if own.source is Source.PARAMS and other.source is Source.INPUTS:
                _written(units, axis)
    return [Value(tuple(axes), _source(x))]


def _sum(units: Units, a: Axis, b: Axis, first: Source, second: Source) -> None:
    """A sum of products over an axis; its slices stay if they are not zero in either factor."""
    labels = units.merge(a.labels, b.labels)
    if labels is None:
        return
    if not (a.zero or b.zero):
        units.stay(Axis(labels))
    kernel, data = (a, b) if first is Source.PARAMS and second is not Source.PARAMS else (b, a)
    by_params = Source.PARAMS in (first, second) and kernel.zero
    if by_params and kernel.labels is not None:
        units.read.update(kernel.labels.tolist())
    units.reads.append(Read(labels, by_params, data.zero))


def _convolution(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    (a, b), c = x, families.convolution(equation)
    if c is None:
        return _anything(units, equation, x, before, after)
    features, inside, filters = a.axes[c.feature], b.axes[c.kernel_in], b.axes[c.kernel_out]
    for value, channel in ((a, (c.batch, c.feature)), (b, (c.kernel_in, c.kernel_out))):
        for k, axis in enumerate(value.axes):
            if k not in channel:
                units.stay(axis)
    result = filters
    if c.groups == 1:
        _sum(units, features, inside, a.source, b.source)
    else:
        units.stay(inside)
        many = before[1][c.kernel_out] // c.groups
        each = before[0][c.feature] // c.groups
        labels = features.labels
        if labels is not None:
            first = np.repeat(labels[::each], each)  # one unit a group of channels
            units.merge(labels, first)
            result = Axis(units.merge(np.repeat(labels[::each], many), filters.labels))
        if filters.labels is not None:
            units.merge(filters.labels, np.repeat(filters.labels[::many], many))
        result = Axis(result.labels, features.zero or filters.zero)
    if b.source is Source.PARAMS and a.source is Source.INPUTS:
        _written(units, filters)
    axes = list(fixed(after[0]).axes)
    axes[c.out_batch], axes[c.out_feature] = a.axes[c.batch], result
    return [Value(tuple(axes), _source(x))]


def _reduced(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    (value,), over = x, equation.params["axes"]
    for k in over:
        axis = value.axes[k]
        if axis.labels is not None and equation.name == "reduce_sum" and axis.zero:
            units.reads.append(Read(axis.labels, False, True))
        else:
            units.stay(axis)
    left = [axis for k, axis in enumerate(value.axes) if k not in over]
    if equation.name in ("argmax", "argmin"):
        left = [Axis(axis.labels) for axis in left]
    return [Value(tuple(left), value.source)]


def _along(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    mixed = families.mixed_axes(equation, before[0], after[0])
    one = len(after) == 1 and equation.name != "reduce_window"
    axes = []
    for k, n in enumerate(after[0]):
        labels, zero = None, one
        for value, shape in zip(x, before, strict=True):
            if shape:
                labels, zero = units.merge(labels, value.axes[k].labels), zero and value.is_zero(k)
        axes.append(Axis(labels, zero))
        if k in mixed:
            units.stay(Axis(labels))
            axes[k] = Axis(np.zeros(n, int))
    return [Value(tuple(axes), _source(x)) for _ in after]


def _gather(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    through = families.gather(equation, before[0])
    axes = list(fixed(after[0]).axes)
    for k, axis in enumerate(x[0].axes):
        if k in through.axes:
            axes[through.out[through.axes.index(k)]] = axis
        else:
            units.stay(axis)
    for axis in x[1].axes:
        units.stay(axis)
    return [Value(tuple(axes), _source(x))]


def _scan(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    """One run of the body for all steps: a unit is that of every layer."""
    params = equation.params
    body, start, carried = flat(params["jaxpr"]), params["num_consts"], params["num_carry"]
    fixed_inputs, carry, stacked = x[:start], x[start : start + carried], x[start + carried :]
    rows = []
    for value in stacked:
        units.stay(value.axes[0])
        rows.append(value._replace(axes=value.axes[1:]))
    sites, reads = len(units.sites), len(units.reads)
    while True:
        del units.sites[sites:], units.reads[reads:]
        made = run(units, body, [*fixed_inputs, *carry, *rows])
        merged = [_either(units, *pair) for pair in zip(carry, made[:carried], strict=True)]
        if all(map(_alike, merged, carry)):
            break
        carry = merged
    ys = [
        value._replace(axes=(Axis(np.zeros(shape[0], int)), *value.axes), source=Source.INPUTS)
        for value, shape in zip(made[carried:], after[carried:], strict=True)
    ]
    return [*carry, *ys]


def _either(units: Units, first: Value, second: Value) -> Value:
    """A value that is now the one, now the other."""
    axes = (
        Axis(units.merge(a.labels, b.labels), first.is_zero(k) and second.is_zero(k))
        for k, (a, b) in enumerate(zip(first.axes, second.axes, strict=True))
    )
    return Value(tuple(axes), max(first.source, second.source))


def _alike(first: Value, second: Value) -> bool:
    def shown(value: Value) -> Any:
        return value.source, [(axis.labels is None, axis.zero) for axis in value.axes]

    return bool(shown(first) == shown(second))


_MARKING = ("dot_general", "conv_general_dilated", "scan")  # which operands are read, which write

_RULES: dict[str, Rule] = {
    **dict.fromkeys(families.ELEMENTWISE, _elementwise),
    **unit_moves.RULES,
    **dict.fromkeys(families.REDUCTIONS, _reduced),
    **dict.fromkeys(families.ALONG, _along),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "scan": _scan,
}
