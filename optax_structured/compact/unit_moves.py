"""How units pass through moves of entries."""

import math
from typing import Any

import numpy as np

from optax_structured.compact import families
from optax_structured.compact.forward import Source
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Shape
from optax_structured.compact.units import Axis, Labels, Units, Value


def _broadcast(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    axes = [Axis(None) for _ in after[0]]
    for axis, n, k in zip(
        x[0].axes, before[0], equation.params["broadcast_dimensions"], strict=True
    ):
        if n == after[0][k]:
            axes[k] = axis
        else:
            units.stay(axis)
    return [Value(tuple(axes), x[0].source, x[0].number)]


def _concatenate(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    along, axes = equation.params["dimension"], []
    for k in range(len(after[0])):
        zero = all(value.is_zero(k) for value in x)
        labels: Labels = None
        if k != along:
            for value in x:
                labels = units.merge(labels, value.axes[k].labels)
        elif any(value.axes[k].labels is not None for value in x):
            parts = []
            for value, shape in zip(x, before, strict=True):
                own = value.axes[k].labels
                parts.append(np.zeros(shape[k], int) if own is None else own)
            labels = np.concatenate(parts)
        axes.append(Axis(labels, zero))
    return [Value(tuple(axes), max(value.source for value in x))]


def _pad(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    config, axes = equation.params["padding_config"], []
    for k, (n, m) in enumerate(zip(before[0], after[0], strict=True)):
        axis, (low, _, gap) = x[0].axes[k], config[k]
        if config[k] == (0, 0, 0):
            axes.append(Axis(axis.labels, axis.zero and x[1].number == 0))
            continue
        labels, at = np.zeros(m, int), low + np.arange(n) * (gap + 1)
        inside = (at >= 0) & (at < m)
        if axis.labels is not None:
            labels[at[inside]] = axis.labels[inside]
        axes.append(Axis(labels, axis.zero))
    return [Value(tuple(axes), x[0].source)]


def _reshape(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    (value,), (small,), (large,) = x, before, after
    positions = value.source is Source.INPUTS
    axes = [Axis(np.zeros(1, int) if positions and n == 1 else None) for n in large]
    for axis, n in zip(value.axes, small, strict=True):
        if n == 1:
            units.stay(axis)
    for ins, outs in families.factors(small, large) if math.prod(large) else []:
        sizes, here = [large[k] for k in outs], [value.axes[k] for k in ins]
        made = _regrouped(units, here, [small[k] for k in ins], sizes)
        for k, axis in zip(outs, made, strict=True):
            axes[k] = axis
    return [Value(tuple(axes), value.source, value.number)]


def _regrouped(units: Units, axes: list[Axis], ins: list[int], outs: list[int]) -> list[Axis]:
    """Axes that become others of the same number of entries."""
    if len(ins) == len(outs) == 1:
        return axes
    if all(axis.labels is None for axis in axes):
        return [Axis(None) for _ in outs]
    made = [Axis(np.zeros(n, int)) for n in outs]
    going = [k for k, axis in enumerate(axes) if units.may_go(axis)]
    if not going or (len(ins) > 1 and len(outs) > 1):
        for axis in axes:
            units.stay(axis)
    elif len(outs) == 1:  # the last axis first: channels are behind positions
        going.reverse()
        k = going[units.choose([axes[k] for k in going])]
        labels = axes[k].labels
        assert labels is not None
        view = [n if j == k else 1 for j, n in enumerate(ins)]
        made[0] = Axis(np.broadcast_to(labels.reshape(view), ins).ravel(), axes[k].zero)
    else:  # the first axis first: heads are before their entries
        labels = axes[0].labels
        assert labels is not None
        place = units.choices.get(len(units.sites), 0)
        table = np.moveaxis(labels.reshape(outs), place, 0).reshape(outs[place], -1)
        for column in table.T:
            units.merge(table[:, 0], column)
        made[place] = Axis(table[:, 0], axes[0].zero)
        units.split(len(outs), table[:, 0])
    return made


def _rev(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    turned = equation.params["dimensions"]
    axes = (
        Axis(axis.labels[::-1], axis.zero) if k in turned and axis.labels is not None else axis
        for k, axis in enumerate(x[0].axes)
    )
    return [Value(tuple(axes), x[0].source)]


def _cut(axis: Axis, where: Any) -> Axis:
    return axis if axis.labels is None else Axis(axis.labels[where], axis.zero)


def _slice(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    params = equation.params
    steps = params["strides"] or (1,) * len(before[0])
    limits = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    axes = (_cut(axis, slice(*s)) for axis, s in zip(x[0].axes, limits, strict=True))
    return [Value(tuple(axes), x[0].source, x[0].number)]


def _split(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    along, start, made = equation.params["axis"], 0, []
    for size in equation.params["sizes"]:
        axes = list(x[0].axes)
        axes[along] = _cut(axes[along], slice(start, start + size))
        made.append(Value(tuple(axes), x[0].source, x[0].number))
        start += size
    return made


def _squeeze(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    gone = {d % len(before[0]) for d in equation.params["dimensions"]}
    for k in gone:
        units.stay(x[0].axes[k])
    axes = (axis for k, axis in enumerate(x[0].axes) if k not in gone)
    return [Value(tuple(axes), x[0].source, x[0].number)]


def _stack(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    axes = []
    for k in range(len(before[0])):
        labels: Labels = None
        for value in x:
            labels = units.merge(labels, value.axes[k].labels)
        axes.append(Axis(labels, all(value.is_zero(k) for value in x)))
    axes.insert(equation.params["axis"], Axis(np.zeros(len(x), int)))
    return [Value(tuple(axes), max(value.source for value in x))]


def _unstack(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    axes = list(x[0].axes)
    units.stay(axes.pop(equation.params["axis"]))
    return [Value(tuple(axes), x[0].source, x[0].number) for _ in after]


def _tile(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    axes = (
        axis if axis.labels is None else Axis(np.tile(axis.labels, n), axis.zero)
        for axis, n in zip(x[0].axes, equation.params["reps"], strict=True)
    )
    return [Value(tuple(axes), x[0].source, x[0].number)]


def _transpose(
    units: Units, equation: Equation, x: list[Value], before: list[Shape], after: list[Shape]
) -> list[Value]:
    axes = (x[0].axes[k] for k in equation.params["permutation"])
    return [Value(tuple(axes), x[0].source, x[0].number)]


RULES = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
