"""What of each value is kept: facts forward, needs backward, until a block of each is left."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.compact import families
from optax_structured.compact.backward import closed, needs
from optax_structured.compact.folding import Folded, fold
from optax_structured.compact.forward import Fact, Source, is_known, varying
from optax_structured.compact.program import Program
from optax_structured.compact.scans import Body, Loop, body_of, loop_of, needs_of, varying_in
from optax_structured.compact.sets import Mask, Sets, everything, hull, joined


@dataclasses.dataclass(eq=False)
class Plan:
    """The blocks of a program that are computed.

    Every entry of a kept block is the entry that the original computes. What a reader needs
    outside of it is the same for all inputs, most often zero.
    """

    program: Program
    facts: list[Fact]
    kept: dict[int, Sets | None]  # of each value that is needed
    folded: dict[int, Folded]  # by the place of the equation
    loops: dict[int, tuple[Body, Loop]]  # likewise
    run: list[int]  # the equations that are left

    def operands(self, place: int) -> list[Fact]:
        """The facts that an equation reads."""
        if place in self.folded:
            return self.folded[place].operands
        return [self.facts[v] for v in self.program.equations[place].inputs]


@dataclasses.dataclass(eq=False)
class Found:
    """What is known of the values of a program, and of the bodies of its loops by place."""

    facts: list[Fact]
    bodies: dict[int, Body]


def facts(program: Program, params: Sequence[Any], inputs: Sequence[Any]) -> Found:
    """What is the same for all inputs, from one run on these."""
    values = _values(program, [*params, *inputs])
    sources = dict.fromkeys(program.constants, Source.CONSTANTS)
    sources |= dict.fromkeys(program.inputs, Source.INPUTS)
    sources |= dict.fromkeys(program.inputs[: len(params)], Source.PARAMS)
    found: list[Fact | None] = [None] * len(values)
    bodies: dict[int, Body] = {}

    def add(v: int, varies: Mask, source: Source) -> None:
        value, of_params = values[v], source is not Source.INPUTS
        if value is None:
            varies = np.full(program.shape(v), not of_params)
            nonzero = np.ones(program.shape(v), bool)
        else:
            nan = value != value
            varies = varies if of_params else varies | nan
            nonzero = varies | (value != 0)
        found[v] = Fact(varies, nonzero, source, value)

    for v, source in sources.items():
        add(v, np.full(program.shape(v), source is Source.INPUTS), source)
    for place, equation in enumerate(program.equations):
        operands = [_found(found[v]) for v in equation.inputs]
        source = max((x.source for x in operands), default=Source.CONSTANTS)
        if equation.has_effects:
            source = Source.INPUTS
        after = [program.shape(v) for v in equation.outputs]
        body = body_of(equation, operands) if equation.name == "scan" else None
        masks = varying(equation, operands, after)
        if body is not None:
            bodies[place], masks = body, varying_in(body, after)
        for v, varies in zip(equation.outputs, masks, strict=True):
            add(v, varies, source)
    return Found([_found(x) for x in found], bodies)


def _found(fact: Fact | None) -> Fact:
    assert fact is not None
    return fact


def _values(program: Program, inputs: Sequence[Any]) -> list[np.ndarray | None]:
    def numbers(*inputs: Any) -> list[Any]:
        return [None if _is_key(x) else x for x in program.evaluate(*inputs)]

    return [None if x is None else np.asarray(x) for x in jax.jit(numbers)(*inputs)]


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.extended))


def plan(
    program: Program,
    known: Found,
    given: Mapping[int, Sets | None],
    wanted: Sequence[Mask] | None = None,
) -> Plan:
    """Keeps what the outputs need, and of that what is not the same for all inputs.

    Args:
      program: of the function.
      known: what is known of its values.
      given: blocks that are settled, by the numbers of the values: inputs are whole.
      wanted: of each output; default all of it.

    Raises:
      ValueError: more is needed of a value than its settled block.
    """
    needed: dict[int, Mask] = {}

    def need(v: int, mask: Mask) -> None:
        needed[v] = needed[v] | mask if v in needed else mask

    found = known.facts
    whole_outputs = [np.ones(program.shape(v), bool) for v in program.outputs]
    for v, mask in zip(program.outputs, whole_outputs if wanted is None else wanted, strict=True):
        need(v, mask)
    loops: dict[int, tuple[Body, Loop]] = {}
    kept: dict[int, Sets | None] = {}
    folded: dict[int, Folded] = {}
    run: list[int] = []
    whole: set[int] = set()  # read by primitives without a rule
    for place in reversed(range(len(program.equations))):
        equation = program.equations[place]
        before = [program.shape(v) for v in equation.inputs]
        after = [program.shape(v) for v in equation.outputs]
        sets: list[Sets | None] = []
        for v, shape in zip(equation.outputs, after, strict=True):
            alive = hull(needed[v] & live(found[v])) if v in needed else None
            if alive is not None and place in known.bodies:
                if v not in equation.outputs[: known.bodies[place].carried]:  # all steps
                    alive = (np.arange(shape[0]), *alive[1:])
            elif alive is not None:
                alive = closed(equation, alive, before[0] if before else (), shape)
            sets.append(alive)
        if all(s is None for s in sets) and not equation.has_effects:
            kept.update(dict.fromkeys(equation.outputs))
            continue
        run.append(place)
        if place in known.bodies:
            body = known.bodies[place]
            loop = loop_of(body, sets, _of_body)
            loops[place] = body, loop
            steps = np.arange(equation.params["length"])
            rows = [None if s is None else (steps, *s) for s in loop.rows]
            kept.update(zip(equation.outputs, [*loop.carry, *rows], strict=True))
            masks = needs_of(body, loop, len(steps))
            for v, mask in zip(equation.inputs, masks, strict=True):
                need(v, mask)
            continue
        if not is_known(equation.name):
            whole.update(equation.inputs)
        operands = [found[v] for v in equation.inputs]
        if (taken := fold(equation, operands)) is not None:
            folded[place], operands = taken, taken.operands
        if len(sets) > 1 and equation.name not in ("split", "unstack"):  # all are made at once
            along = equation.name in families.ALONG
            together = functools.reduce(joined, sets) if along else None
            sets = [together if along else everything(shape) for shape in after]
        kept.update(zip(equation.outputs, sets, strict=True))
        for v, mask in zip(equation.inputs, needs(equation, sets, operands, after), strict=True):
            need(v, mask)
    kept.update((v, everything(program.shape(v))) for v in program.constants)
    for v in program.inputs:
        reads = hull(needed[v] & live(found[v])) if v in needed else None
        if v in whole:
            reads = everything(program.shape(v))
        kept[v] = given.get(v, reads)
        if not _holds(kept[v], reads):
            raise ValueError(
                "for inputs of this shape the function reads parameters that were cut: compact it "
                "again with inputs like these"
            )
    return Plan(program, found, kept, folded, loops, run[::-1])


def _of_body(
    program: Program, found: list[Fact], given: dict[int, Sets | None], wanted: list[Mask]
) -> Plan:
    return plan(program, Found(found, {}), given, wanted)


def _holds(outer: Sets | None, inner: Sets | None) -> bool:
    if outer is None or inner is None:
        return inner is None
    return all(np.isin(b, a).all() for a, b in zip(outer, inner, strict=True))


def live(fact: Fact) -> Mask:
    """What has to be computed if it is needed: parameters change, so only their zeros do not."""
    if fact.source is Source.CONSTANTS:
        return np.ones_like(fact.varies)
    return fact.nonzero if fact.source is Source.PARAMS else fact.varies
