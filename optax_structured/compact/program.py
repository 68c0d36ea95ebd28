"""A function as a flat list of equations: calls are entered, loops and branches stay whole."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.xla import jaxprs as core

# Calls whose body is computed as if it were written where the call stands.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One operation; values are numbers into the tables of its program."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    has_effects: bool

    @property
    def name(self) -> str:
        return str(self.primitive.name)

    def run(self, operands: Sequence[Any], **changed: Any) -> list[Any]:
        """The results, with some of the parameters changed."""
        found = self.primitive.get_bind_params(self.params | changed)
        # Releases of JAX before 0.10 hand the functions among the parameters over by themselves.
        functions, params = ((), found) if isinstance(found, dict) else found
        made = self.primitive.bind(*functions, *operands, **params)
        return list(made) if self.primitive.multiple_results else [made]


@dataclasses.dataclass(eq=False)
class Program:
    """Equations in order, and what is known of their values: shapes, types, constants."""

    avals: list[Any] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    equations: list[Equation] = dataclasses.field(default_factory=list)
    inputs: list[int] = dataclasses.field(default_factory=list)
    outputs: list[int] = dataclasses.field(default_factory=list)

    def shape(self, v: int) -> tuple[int, ...]:
        return tuple(self.avals[v].shape)

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def evaluate(self, *inputs: Any) -> list[Any]:
        """Every value, by its number."""
        values: dict[int, Any] = dict(self.constants)
        values.update(zip(self.inputs, inputs, strict=True))
        for equation in self.equations:
            made = equation.run([values[v] for v in equation.inputs])
            values.update(zip(equation.outputs, made, strict=True))
        return [values[v] for v in range(len(self.avals))]


def trace(function: Callable[..., Any], *inputs: Any, unroll: bool) -> tuple[Program, Any]:
    """The program of a function of trees of arrays, and the tree that it returns.

    Args:
      function: that is traced.
      *inputs: trees of arrays or shapes.
      unroll: write every step of a scan out.

    Raises:
      TypeError: the function needs the numbers of its arguments while it is traced.
    """
    try:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*inputs)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            "compact: the function reads the numbers of its parameters or inputs in Python (an if, "
            "an int() or a numpy call on them), so it is not one program for all inputs: close "
            f"over such values, or use jax.lax.cond and jax.numpy. {error}"
        ) from error
    return flat(closed, unroll), jax.tree.structure(out)


def flat(closed: Any, unroll: bool = False) -> Program:
    """The program of a closed jaxpr."""
    program = Program()
    program.inputs = [program.new(v.aval) for v in closed.jaxpr.invars]
    program.outputs = _enter(program, closed.jaxpr, closed.consts, program.inputs, unroll)
    return program


def _enter(
    program: Program, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int], unroll: bool
) -> list[int]:
    """Adds the equations of a jaxpr; returns the numbers of its outputs."""
    number: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

    def constant(aval: Any, value: Any) -> int:
        v = program.new(aval)
        program.constants[v] = value
        return v

    def read(v: Any) -> int:
        return constant(v.aval, v.val) if isinstance(v, core.Literal) else number[v]

    for v, value in zip(jaxpr.constvars, consts, strict=True):
        number[v] = constant(v.aval, value)
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if eqn.primitive.name == "scan" and unroll:
            made = _unrolled(program, eqn.params, operands)
        elif body is not None:
            inner, captured = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
            made = _enter(program, inner, captured, operands, unroll)
        else:
            made = [program.new(v.aval) for v in eqn.outvars]
            effects = bool(eqn.effects)
            program.equations.append(
                Equation(eqn.primitive, dict(eqn.params), tuple(operands), tuple(made), effects)
            )
        number.update(zip(eqn.outvars, made, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _unrolled(program: Program, params: dict[str, Any], operands: Sequence[int]) -> list[int]:
    """Adds the steps of a scan one after the other; returns the numbers of its outputs."""
    body, length, carried = params["jaxpr"], params["length"], params["num_carry"]
    start = params["num_consts"]
    fixed, carry = operands[:start], list(operands[start : start + carried])
    stacked = operands[start + carried :]
    rows: list[list[int]] = []
    steps = range(length)
    for i in reversed(steps) if params["reverse"] else steps:
        row = [
            _add(program, lambda x, i=i: jax.lax.index_in_dim(x, i, keepdims=False), v)
            for v in stacked
        ]
        made = _enter(program, body.jaxpr, body.consts, [*fixed, *carry, *row], unroll=True)
        carry, ys = made[:carried], made[carried:]
        rows.append(ys)
    if params["reverse"]:
        rows.reverse()
    columns = zip(*rows, strict=True) if rows else ()
    return carry + [_add(program, lambda *x: jnp.stack(x), *column) for column in columns]


def _add(program: Program, function: Callable[..., Any], *operands: int) -> int:
    """Adds the equations of a function."""
    closed = jax.make_jaxpr(function)(*(program.avals[v] for v in operands))
    (made,) = _enter(program, closed.jaxpr, closed.consts, operands, unroll=False)
    return made
