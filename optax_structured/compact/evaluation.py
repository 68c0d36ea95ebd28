"""The program at the shapes that are left: one rule a family, on operands cut to what it reads."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_structured.compact import factors, families, moves
from optax_structured.compact.forward import Fact
from optax_structured.compact.plan import Plan
from optax_structured.compact.program import Equation
from optax_structured.compact.scans import run_loop
from optax_structured.compact.sets import Sets, Shape, block, everything, hull, sizes
from optax_structured.compact.slices import Fetch, Kept, one, take


def evaluate(plan: Plan, params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs, in their whole shapes.

    Args:
      plan: of the program.
      params: cut to `plan.kept`, some of them as `Factors`.
      inputs: whole.
    """
    shapes = [plan.program.shape(v) for v in plan.program.outputs]
    return _evaluated(plan, [*params, *inputs], [everything(shape) for shape in shapes])


def _evaluated(plan: Plan, inputs: list[Any], wanted: Sequence[Sets | None]) -> list[Any]:
    """Slices of the outputs; None for those of which none are wanted."""
    program = plan.program
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.inputs, inputs, strict=True))
    for place in plan.run:
        equation = program.equations[place]
        facts = plan.operands(place)
        kept = [plan.kept.get(v) for v in equation.outputs]

        stay = equation.name in factors.TAKEN or place in plan.loops

        def get(i: int, sets: Sets, equation: Equation = equation, stay: bool = stay) -> Any:
            x = fetch(plan, values, equation.inputs[i], sets)
            return x.merged() if factors.is_factors(x) and not stay else x

        if place in plan.loops:
            body, loop = plan.loops[place]
            made = run_loop(equation, loop, body, get, _evaluated)
            values.update(zip(equation.outputs, made, strict=True))
            continue
        made = _run(equation, kept, facts, get, [program.shape(v) for v in equation.outputs])
        if place in plan.folded and kept[0] is not None:
            constant = plan.folded[place].constant
            view = constant[np.ix_(*families.repeated(kept[0], constant.shape))]
            made = [made[0] + jnp.asarray(view, made[0].dtype)]
        values.update(zip(equation.outputs, made, strict=True))
    pairs = zip(program.outputs, wanted, strict=True)
    return [None if sets is None else fetch(plan, values, v, sets) for v, sets in pairs]


def fetch(plan: Plan, values: dict[int, Any], v: int, sets: Sets) -> Any:
    """Slices of a value: those that are kept, and the constants of those that are not."""
    kept, fact, aval = plan.kept.get(v), plan.facts[v], plan.program.avals[v]
    x = None
    if kept is not None:
        x = values[v]
        if factors.is_factors(x):
            return factors.sliced(x, kept, sets)
        for axis, (have, want) in enumerate(zip(kept, sets, strict=True)):
            x = take(x, axis, have, want)
    if fact.of_params or fact.value is None or 0 in sizes(sets):
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
    sets = one(kept)
    operands = [get(i, families.repeated(sets, y.varies.shape)) for i, y in enumerate(x)]
    if any(map(factors.is_factors, operands)):
        return [factors.converted(equation, operands[0])]
    return equation.run(operands)


def _reduce(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    axes, sets, shape = equation.params["axes"], one(kept), x[0].varies.shape
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
    sets, mixed = one(kept), families.mixed_axes(equation, shape, after[0])
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
    chosen = dict(zip(d.out, one(kept), strict=True))
    a, b = (
        operand.nonzero[np.ix_(*(chosen.get(s, np.arange(n)) for s, n in _axes(side, operand)))]
        for side, operand in ((d.left, x[0]), (d.right, x[1]))
    )
    summed = hull(families.product(d.left, d.right, d.summed, a, b))
    assert summed is not None or not d.summed
    chosen.update(zip(d.summed, summed or (), strict=True))
    operands = [get(i, tuple(chosen[s] for s in side)) for i, side in enumerate((d.left, d.right))]
    if any(map(factors.is_factors, operands)):
        return [factors.product(equation, operands)]
    return equation.run(operands)


def _axes(letters: str, operand: Fact) -> list[tuple[str, int]]:
    return list(zip(letters, operand.varies.shape, strict=True))


def _convolution(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    c, sets = families.convolution(equation), one(kept)
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
    data, weights = get(0, tuple(lhs)), get(1, tuple(rhs))
    if factors.is_factors(weights):
        return [factors.convolution(equation, data, weights)]
    return equation.run([data, weights], feature_group_count=len(alive[0]))


def _gather(
    equation: Equation, kept: Kept, x: Sequence[Fact], get: Fetch, after: list[Shape]
) -> list[Any]:
    sets, shape = one(kept), x[0].varies.shape
    through = families.gather(equation, shape)
    ins, lengths = [np.arange(n) for n in shape], list(equation.params["slice_sizes"])
    for k, out in zip(through.axes, through.out, strict=True):
        ins[k], lengths[k] = sets[out], len(sets[out])
    indices = get(1, everything(x[1].varies.shape))
    return equation.run([get(0, tuple(ins)), indices], slice_sizes=tuple(lengths))


_RULES: dict[str, Callable[..., list[Any]]] = {
    **moves.RULES,
    **dict.fromkeys(families.REDUCTIONS, _reduce),
    **dict.fromkeys(families.ALONG, _along),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
