"""Moves of entries at the shapes that are left: one rule a primitive."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_structured.compact import families
from optax_structured.compact.factors import reshaped, transposed
from optax_structured.compact.forward import Fact
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Shape, sizes
from optax_structured.compact.slices import Fetch, Kept, chosen, one, replaced


def _broadcast(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets, axes = one(kept), equation.params["broadcast_dimensions"]
    operand = get(0, families.repeated(tuple(sets[k] for k in axes), x[0].varies.shape))
    return [lax.broadcast_in_dim(operand, sizes(sets), axes)]


def _concatenate(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets, axis = one(kept), equation.params["dimension"]
    parts, start = [], 0
    for i, operand in enumerate(x):
        size = operand.varies.shape[axis]
        here = sets[axis][(sets[axis] >= start) & (sets[axis] < start + size)] - start
        if len(here):
            parts.append(get(i, replaced(sets, axis, here)))
        start += size
    return [lax.concatenate(parts, axis)]


def _pad(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    # Kept slices are the operand's or padding, in any order: one slice of padding is enough.
    sets, shape = one(kept), x[0].varies.shape
    config = equation.params["padding_config"]
    value = get(1, ())
    inner, places, widths = [], [], []
    for want, n, m, (low, _, gap) in zip(sets, shape, after[0], config, strict=True):
        at = low + np.arange(n) * (gap + 1)
        number = np.full(m, -1)
        inside = (at >= 0) & (at < m)
        number[at[inside]] = np.flatnonzero(inside)
        have = number[want]
        inner.append(have[have >= 0])
        places.append(have)
    if not all(map(len, inner)):
        return [jnp.broadcast_to(value, sizes(sets))]
    result = get(0, tuple(inner))
    for axis, (have, want) in enumerate(zip(inner, places, strict=True)):
        inside = np.flatnonzero(want >= 0)
        steps = np.diff(inside)
        gap = int(steps[0]) if len(steps) else 1
        if (steps == gap).all():
            width = (int(inside[0]), len(want) - 1 - int(inside[-1]), gap - 1)
            widths.append(width)
            continue
        widths.append((0, 0, 0))
        extra = [(0, 1, 0) if k == axis else (0, 0, 0) for k in range(result.ndim)]
        index = np.where(want >= 0, np.cumsum(want >= 0) - 1, len(have))
        result = chosen(lax.pad(result, value, extra), index, axis)
    return [lax.pad(result, value, widths)]


def _reshape(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    before = x[0].varies.shape
    ins, outs = families.through_reshape(one(kept), after[0], before)
    return [reshaped(get(0, ins), sizes(outs))]


def _rev(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    turned = equation.params["dimensions"]
    sets = tuple(
        n - 1 - s[::-1] if k in turned else s
        for k, (s, n) in enumerate(zip(one(kept), after[0], strict=True))
    )
    return [lax.rev(get(0, sets), turned)]


def _slice(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    params, sets = equation.params, one(kept)
    steps = params["strides"] or (1,) * len(sets)
    starts = zip(sets, params["start_indices"], steps, strict=True)
    return [get(0, tuple(start + step * s for s, start, step in starts))]


def _split(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    axis, start = equation.params["axis"], 0
    results: list[Any] = []
    for sets, size in zip(kept, equation.params["sizes"], strict=True):
        results.append(None if sets is None else get(0, replaced(sets, axis, sets[axis] + start)))
        start += size
    return results


def _squeeze(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    gone = {d % x[0].varies.ndim for d in equation.params["dimensions"]}
    rest = iter(one(kept))
    sets = tuple(np.arange(1) if k in gone else next(rest) for k in range(x[0].varies.ndim))
    return [reshaped(get(0, sets), sizes(one(kept)))]


def _stack(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets, axis = one(kept), equation.params["axis"]
    rest = sets[:axis] + sets[axis + 1 :]
    return [lax.concatenate([lax.expand_dims(get(i, rest), (axis,)) for i in sets[axis]], axis)]


def _unstack(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    axis, results = equation.params["axis"], list[Any]()
    for i, sets in enumerate(kept):
        if sets is None:
            results.append(None)
            continue
        part = get(0, (*sets[:axis], np.array([i]), *sets[axis:]))
        results.append(lax.squeeze(part, (axis,)))
    return results


def _tile(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    return [get(0, tuple(s % n for s, n in zip(one(kept), x[0].varies.shape, strict=True)))]


def _transpose(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    permutation, sets = equation.params["permutation"], one(kept)
    ins = tuple(sets[permutation.index(k)] for k in range(len(sets)))
    return [transposed(get(0, ins), permutation)]


RULES: dict[str, Callable[..., list[Any]]] = {
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
