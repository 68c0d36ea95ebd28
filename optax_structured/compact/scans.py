"""Loops over stacked layers: one smaller body for all steps, with the same cut in every layer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.compact.factors import in_steps, of_step
from optax_structured.compact.forward import Fact, Source, varying
from optax_structured.compact.program import Equation, Program, flat
from optax_structured.compact.sets import Mask, Sets, Shape, block, joined


@dataclasses.dataclass(eq=False)
class Body:
    """The body of a scan, and what is zero in every step."""

    program: Program
    facts: list[Fact]
    fixed: int  # inputs that are the same in all steps
    carried: int  # and those that a step hands to the next one


def body_of(equation: Equation, operands: Sequence[Fact]) -> Body | None:
    """Facts that hold in all steps; None where a value has no numbers, as a random key."""
    params = equation.params
    fixed, carried = params["num_consts"], params["num_carry"]
    program = flat(params["jaxpr"])
    if equation.has_effects or any(x.value is None for x in operands):
        return None
    if any(jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in program.avals):
        return None
    nonzero = _nonzero(equation, program, [x.value for x in operands])
    inputs = [*operands[: fixed + carried]]
    for x in operands[fixed + carried :]:
        varies, nonzero_in = (np.asarray(mask.any(axis=0)) for mask in (x.varies, x.nonzero))
        inputs.append(Fact(varies, nonzero_in, x.source, None))
    while True:
        facts = _facts(program, inputs, nonzero)
        again = list(inputs)
        for i, v in enumerate(program.outputs[:carried], start=fixed):
            first, then = inputs[i], facts[v]
            source = max(first.source, then.source)
            either = first.varies | then.varies, first.nonzero | then.nonzero
            again[i] = Fact(*either, source, None)
        if all(_alike(a, b) for a, b in zip(again, inputs, strict=True)):
            return Body(program, facts, fixed, carried)
        inputs = again


def _alike(a: Fact, b: Fact) -> bool:
    same = (a.varies == b.varies).all() and (a.nonzero == b.nonzero).all()
    return bool(same) and a.source == b.source


def _nonzero(equation: Equation, program: Program, values: list[Any]) -> list[Mask]:
    """For each value of the body, which entries are not zero in some step."""
    params = equation.params
    fixed, carried = params["num_consts"], params["num_carry"]

    def step(carry: Any, row: Any) -> tuple[Any, Any]:
        state, marks = carry
        made = program.evaluate(*values[:fixed], *state, *row)
        marks = [mark | (x != 0) for mark, x in zip(marks, made, strict=True)]
        return ([made[v] for v in program.outputs[:carried]], marks), None

    def run(values: list[Any]) -> list[Any]:
        start = [np.zeros(program.shape(v), bool) for v in range(len(program.avals))]
        carry = [jnp.asarray(x) for x in values[fixed : fixed + carried]]
        rows = values[fixed + carried :]
        settings = {"length": params["length"], "reverse": params["reverse"]}
        return jax.lax.scan(step, (carry, start), rows, **settings)[0][1]

    return [np.asarray(x) for x in jax.jit(run)(values)]


def _facts(program: Program, inputs: Sequence[Fact], nonzero: list[Mask]) -> list[Fact]:
    """As `plan.facts`, without constants other than zero: they may differ from step to step."""
    found: dict[int, Fact] = {}

    def add(v: int, varies: Mask, source: Source) -> None:
        marks = varies | nonzero[v]
        moving = marks if source is Source.INPUTS else np.zeros_like(marks)
        found[v] = Fact(moving, marks, source, None)

    for v in program.constants:
        add(v, np.zeros(program.shape(v), bool), Source.CONSTANTS)
    for v, fact in zip(program.inputs, inputs, strict=True):
        add(v, fact.varies | fact.nonzero, fact.source)
    for equation in program.equations:
        operands = [found[v] for v in equation.inputs]
        source = max((x.source for x in operands), default=Source.CONSTANTS)
        if equation.has_effects:
            source = Source.INPUTS
        after = [program.shape(v) for v in equation.outputs]
        for v, varies in zip(equation.outputs, varying(equation, operands, after), strict=True):
            add(v, varies, source)
    return [found[v] for v in range(len(program.avals))]


def varying_in(body: Body, after: Sequence[Shape]) -> list[Mask]:
    """The entries of each result of the loop that may vary, or are not zero."""
    found = []
    for i, (v, shape) in enumerate(zip(body.program.outputs, after, strict=True)):
        place = body.program.inputs[body.fixed + i] if i < body.carried else v
        mask = body.facts[v].nonzero | body.facts[place].nonzero
        found.append(np.broadcast_to(mask, shape))
    return found


@dataclasses.dataclass(eq=False)
class Loop:
    """The plan of a body, and the blocks that it hands over."""

    plan: Any  # a `Plan` of the body
    carry: list[Sets | None]
    rows: list[Sets | None]  # of what each step gives


def loop_of(
    body: Body,
    kept: Sequence[Sets | None],
    plan: Callable[[Program, list[Fact], dict[int, Sets | None], list[Mask]], Any],
) -> Loop:
    """Plans a body for blocks of the results: what a step needs of the one before is added."""
    program, start = body.program, body.fixed
    carry = list(kept[: body.carried])
    rows = [None if sets is None else sets[1:] for sets in kept[body.carried :]]
    while True:
        shapes = [program.shape(v) for v in program.outputs]
        wanted = [block(shape, s) for shape, s in zip(shapes, [*carry, *rows], strict=True)]
        made = plan(program, body.facts, {}, wanted)
        needed = [made.kept[v] for v in program.inputs[start : start + body.carried]]
        grown = [joined(a, b) for a, b in zip(carry, needed, strict=True)]
        if all(_same(a, b) for a, b in zip(grown, carry, strict=True)):
            break
        carry = grown
    given = dict(zip(program.inputs[start : start + body.carried], carry, strict=True))
    return Loop(plan(program, body.facts, given, wanted), carry, rows)


def _same(a: Sets | None, b: Sets | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def needs_of(body: Body, loop: Loop, length: int) -> list[Mask]:
    """The entries of the operands of the loop that its smaller body reads."""
    program, found = body.program, []
    for i, v in enumerate(program.inputs):
        mask = block(program.shape(v), loop.plan.kept[v])
        stacked = i >= body.fixed + body.carried
        found.append(np.broadcast_to(mask, (length, *mask.shape)) if stacked else mask)
    return found


def run_loop(
    equation: Equation,
    loop: Loop,
    body: Body,
    get: Callable[[int, Sets], Any],
    evaluate: Callable[[Any, list[Any], list[Sets | None]], list[Any]],
) -> list[Any]:
    """The results of the loop at their blocks; None for what nobody needs."""
    params, program = equation.params, body.program
    ends = body.fixed, body.fixed + body.carried
    operands: list[Any] = []
    for i, v in enumerate(program.inputs):
        sets = loop.plan.kept[v]
        whole = sets if i < ends[1] or sets is None else (np.arange(params["length"]), *sets)
        operand = None if whole is None else get(i, whole)
        operands.append(in_steps(operand) if i >= ends[1] else operand)

    def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        inputs = [*operands[: ends[0]], *carry, *map(of_step, row)]
        made = evaluate(loop.plan, inputs, [*loop.carry, *loop.rows])
        return made[: body.carried], made[body.carried :]

    settings = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, rows = jax.lax.scan(step, operands[ends[0] : ends[1]], operands[ends[1] :], **settings)
    return [*carry, *rows]
