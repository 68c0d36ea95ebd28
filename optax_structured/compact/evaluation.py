"""The program at the shapes that are left: one rule a family, on operands cut to what it reads."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_structured.compact import families
from optax_structured.compact.forward import Fact
from optax_structured.compact.plan import Plan
from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Sets, Shape, block, everything, hull, sizes

Fetch = Callable[[int, Sets], Any]  # an operand by its place, its slices
Kept = Sequence[Sets | None]


def evaluate(plan: Plan, params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs, in their whole shapes.

    Args:
      plan: of the program.
      params: cut to `plan.kept`; a pair of factors for a matrix is multiplied one by one.
      inputs: whole.
    """
    program = plan.program
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.inputs, [*params, *inputs], strict=True))
    for place in plan.run:
        equation = program.equations[place]
        facts = plan.operands(place)
        kept = [plan.kept.get(v) for v in equation.outputs]

        def get(i: int, sets: Sets, equation: Equation = equation) -> Any:
            return fetch(plan, values, equation.inputs[i], sets)

        made = _run(equation, kept, facts, get, [program.shape(v) for v in equation.outputs])
        if place in plan.folded and kept[0] is not None:
            constant = plan.folded[place].constant
            view = constant[np.ix_(*families.repeated(kept[0], constant.shape))]
            made = [made[0] + jnp.asarray(view, made[0].dtype)]
        values.update(zip(equation.outputs, made, strict=True))
    return [fetch(plan, values, v, everything(program.shape(v))) for v in program.outputs]


def fetch(plan: Plan, values: dict[int, Any], v: int, sets: Sets) -> Any:
    """Slices of a value: those that are kept, and the constants of those that are not."""
    kept, fact, aval = plan.kept.get(v), plan.facts[v], plan.program.avals[v]
    x = None
    if kept is not None:
        x = values[v]
        for axis, (have, want) in enumerate(zip(kept, sets, strict=True)):
            x = take(x, axis, have, want)
    if fact.of_params or fact.value is None:
        return jnp.zeros(sizes(sets), aval.dtype) if x is None else x
    rest = ~fact.varies & ~block(fact.varies.shape, kept)
    constant = np.where(rest, fact.value, np.zeros((), fact.value.dtype))[np.ix_(*sets)]
    for axis in range(constant.ndim):
        first = constant.take([0], axis=axis)
        if (constant == first).all():
            constant = first
    if not constant.any():
        return jnp.zeros(sizes(sets), aval.dtype) if x is None else x
    if x is None:
        return jnp.broadcast_to(jnp.asarray(constant), sizes(sets))
    return x | constant if constant.dtype == bool else x + constant


def take(x: Any, axis: int, have: np.ndarray, want: np.ndarray) -> Any:
    """Slices along an axis by their original numbers; zeros where they are not there."""
    if len(have) == len(want) and (have == want).all():
        return x
    place = np.minimum(np.searchsorted(have, want), len(have) - 1)
    there = have[place] == want
    if there.all():
        low, high = place[0], place[-1] + 1
        if high - low == len(place) and (np.diff(place) == 1).all():
            return lax.slice_in_dim(x, low, high, axis=axis)
        return _chosen(x, place, axis)
    if (
        there.any()
        and (have[place[there]] == have).all()
        and (np.diff(np.flatnonzero(there)) == 1).all()
    ):
        before = int(np.argmax(there))
        return _padded(x, axis, before, len(want) - before - int(there.sum()))
    x = _padded(x, axis, 0, 1)
    return _chosen(x, np.where(there, place, len(have)), axis)


def _chosen(x: Any, places: np.ndarray, axis: int) -> Any:
    index = (slice(None),) * axis + (places,)
    return x.at[index].get(mode="promise_in_bounds")


def _padded(x: Any, axis: int, before: int, after: int) -> Any:
    widths = [(before, after, 0) if k == axis else (0, 0, 0) for k in range(x.ndim)]
    return lax.pad(x, np.zeros((), x.dtype), widths)


def _run(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    rule = _RULES.get(equation.name)
    if rule is None:
        rule = _elementwise if equation.name in families.ELEMENTWISE else _whole
    return rule(equation, kept, x, get, after)


def _whole(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    operands = [get(i, everything(operand.varies.shape)) for i, operand in enumerate(x)]
    return equation.run(operands)


def _elementwise(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets = _one(kept)
    return equation.run(
        [get(i, families.repeated(sets, operand.varies.shape)) for i, operand in enumerate(x)]
    )


def _broadcast(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets, axes = _one(kept), equation.params["broadcast_dimensions"]
    operand = get(0, families.repeated(tuple(sets[k] for k in axes), x[0].varies.shape))
    return [lax.broadcast_in_dim(operand, sizes(sets), axes)]


def _concatenate(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets, axis = _one(kept), equation.params["dimension"]
    parts, start = [], 0
    for i, operand in enumerate(x):
        size = operand.varies.shape[axis]
        here = sets[axis][(sets[axis] >= start) & (sets[axis] < start + size)] - start
        if len(here):
            parts.append(get(i, _with(sets, axis, here)))
        start += size
    return [lax.concatenate(parts, axis)]


def _pad(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    # Kept slices are the operand's or padding, in any order: one slice of padding is enough.
    sets, shape = _one(kept), x[0].varies.shape
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
        one = [(0, 1, 0) if k == axis else (0, 0, 0) for k in range(result.ndim)]
        index = np.where(want >= 0, np.cumsum(want >= 0) - 1, len(have))
        result = _chosen(lax.pad(result, value, one), index, axis)
    return [lax.pad(result, value, widths)]


def _reshape(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    before = x[0].varies.shape
    ins, outs = families.through_reshape(_one(kept), after[0], before)
    return [lax.reshape(get(0, ins), sizes(outs))]


def _rev(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    turned = equation.params["dimensions"]
    sets = tuple(
        n - 1 - s[::-1] if k in turned else s
        for k, (s, n) in enumerate(zip(_one(kept), after[0], strict=True))
    )
    return [lax.rev(get(0, sets), turned)]


def _slice(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    params, sets = equation.params, _one(kept)
    steps = params["strides"] or (1,) * len(sets)
    starts = zip(sets, params["start_indices"], steps, strict=True)
    return [get(0, tuple(start + step * s for s, start, step in starts))]


def _split(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    axis, start = equation.params["axis"], 0
    results: list[Any] = []
    for sets, size in zip(kept, equation.params["sizes"], strict=True):
        results.append(None if sets is None else get(0, _with(sets, axis, sets[axis] + start)))
        start += size
    return results


def _squeeze(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    gone = {d % x[0].varies.ndim for d in equation.params["dimensions"]}
    rest = iter(_one(kept))
    sets = tuple(np.arange(1) if k in gone else next(rest) for k in range(x[0].varies.ndim))
    return [lax.squeeze(get(0, sets), tuple(gone))]


def _transpose(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    permutation, sets = equation.params["permutation"], _one(kept)
    ins = tuple(sets[permutation.index(k)] for k in range(len(sets)))
    return [lax.transpose(get(0, ins), permutation)]


def _reduce(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    axes, sets, shape = equation.params["axes"], _one(kept), x[0].varies.shape
    outer = iter(sets)
    ins = [np.arange(n) if k in axes else next(outer) for k, n in enumerate(shape)]
    if equation.name == "reduce_sum":  # zeros need not be added
        left = hull(x[0].nonzero[np.ix_(*ins)])
        ins = [s if k not in axes or left is None else s[left[k]] for k, s in enumerate(ins)]
    return equation.run([get(0, tuple(ins))])


def _along(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    shape = x[0].varies.shape
    sets, mixed = _one(kept), families.mixed_axes(equation, shape, after[0])
    changed = {}
    if equation.name == "dynamic_slice":
        changed["slice_sizes"] = sizes(sets)
    operands = []
    for i, operand in enumerate(x):
        own = operand.varies.shape
        axes = mixed | families.mixed_axes(equation, own, shape) if own else mixed
        operands.append(
            get(i, tuple(np.arange(n) if k in axes else sets[k] for k, n in enumerate(own)))
        )
    return equation.run(operands, **changed)


def _dot(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    d = families.dot(equation, x[0].varies.shape, x[1].varies.shape)
    chosen = dict(zip(d.out, _one(kept), strict=True))
    a, b = (
        operand.nonzero[np.ix_(*(chosen.get(s, np.arange(n)) for s, n in _axes(side, operand)))]
        for side, operand in ((d.left, x[0]), (d.right, x[1]))
    )
    summed = hull(families.product(d.left, d.right, d.summed, a, b))
    assert summed is not None or not d.summed
    chosen.update(zip(d.summed, summed or (), strict=True))
    return equation.run(
        [get(0, tuple(chosen[s] for s in d.left)), get(1, tuple(chosen[s] for s in d.right))]
    )


def _axes(letters: str, operand: Fact) -> list[tuple[str, int]]:
    return list(zip(letters, operand.varies.shape, strict=True))


def _convolution(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    c, sets = families.convolution(equation), _one(kept)
    if c is None:
        return _whole(equation, kept, x, get, after)
    (a, b), left, right = x, x[0].varies.shape, x[1].varies.shape
    features = np.zeros(after[0][c.out_feature], bool)
    features[sets[c.out_feature]] = True
    grouped = features.reshape(c.groups, -1)
    alive = hull(grouped)
    assert alive is not None
    kernel = c.kernel(b.nonzero)[alive[0]][:, alive[1]]
    inputs = np.flatnonzero((c.inputs(a.nonzero)[:, alive[0]] & kernel.any(axis=1)).any((0, 1)))
    per_group = right[c.kernel_in]
    feature_in = (alive[0][:, None] * per_group + inputs).ravel()
    lhs = [np.arange(n) for n in left]
    lhs[c.batch], lhs[c.feature] = sets[c.out_batch], feature_in
    rhs = [np.arange(n) for n in right]
    rhs[c.kernel_out], rhs[c.kernel_in] = sets[c.out_feature], inputs
    return equation.run([get(0, tuple(lhs)), get(1, tuple(rhs))], feature_group_count=len(alive[0]))


def _gather(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets, shape = _one(kept), x[0].varies.shape
    through = families.gather(equation, shape)
    ins, lengths = [np.arange(n) for n in shape], list(equation.params["slice_sizes"])
    for k, out in zip(through.axes, through.out, strict=True):
        ins[k], lengths[k] = sets[out], len(sets[out])
    indices = get(1, everything(x[1].varies.shape))
    return equation.run([get(0, tuple(ins)), indices], slice_sizes=tuple(lengths))


def _one(kept: Kept) -> Sets:
    sets = next(s for s in kept if s is not None)
    return sets


def _with(sets: Sets, axis: int, here: np.ndarray) -> Sets:
    return tuple(here if k == axis else s for k, s in enumerate(sets))


_RULES: dict[str, Callable[..., list[Any]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
    **dict.fromkeys(families.REDUCTIONS, _reduce),
    **dict.fromkeys(families.ALONG, _along),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
