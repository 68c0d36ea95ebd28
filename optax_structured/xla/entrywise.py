"""Programs in which every entry of an array goes its own way, run on arrays of another shape."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import on_explicit_mesh
from optax_structured.xla import jaxprs as core

Shape = tuple[int, ...]

# Operations that say nothing of axes; between arrays of one shape and scalars, each entry of the
# result is made from the entries in its place.
_ENTRYWISE = frozenset(
    """abs add and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or
    pow rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor""".split()
)


def is_entrywise(equations: Iterable[Any], shape: Shape) -> bool:
    """Whether equations on arrays of this shape and scalars treat every entry by itself."""
    return all(_fits(equation, shape) for equation in equations)


def _fits(equation: Any, shape: Shape) -> bool:
    shapes = {v.aval.shape for v in (*equation.invars, *equation.outvars)}
    if shapes == {()}:
        return True
    if not shapes <= {shape, ()}:
        return False
    name = equation.primitive.name
    if name == "jit":
        return is_entrywise(equation.params["jaxpr"].eqns, shape)
    if name == "broadcast_in_dim":
        return equation.invars[0].aval.shape == ()
    return name in _ENTRYWISE and all(v.aval.shape == shape for v in equation.outvars)


def evaluate(
    equations: Iterable[Any], values: dict[Any, Any], shape: Shape, model: jax.Array
) -> None:
    """Adds the results of entrywise equations to `values`.

    Args:
      equations: that are entrywise for `shape`.
      values: of variables; those of arrays of `shape` are of the shape of `model` here.
      shape: of the program.
      model: an array with the shape and placement to take in its place.
    """

    def read(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else values[v]

    for equation in equations:
        operands = [read(v) for v in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name == "jit":
            inner = params["jaxpr"]
            made = run(inner, operands, shape, model)
        elif name == "broadcast_in_dim" and equation.outvars[0].aval.shape == shape:
            out = jax.typeof(model).sharding if on_explicit_mesh(model) else None
            made = [jax.lax.broadcast_in_dim(operands[0], model.shape, (), out_sharding=out)]
        else:
            made = equation.primitive.bind(*operands, **params)
            made = made if equation.primitive.multiple_results else [made]
        values.update(zip(equation.outvars, made, strict=True))


def run(closed: Any, operands: Sequence[Any], shape: Shape, model: jax.Array) -> list[Any]:
    """The results of an entrywise program."""
    program = closed.jaxpr
    values = dict(zip(program.constvars, closed.consts, strict=True))
    values.update(zip(program.invars, operands, strict=True))
    evaluate(program.eqns, values, shape, model)
    return [value_of(v, values) for v in program.outvars]


def value_of(v: Any, values: Mapping[Any, jax.Array]) -> jax.Array:
    """The value of a variable, or that of a constant written in its place."""
    if not isinstance(v, core.Literal):
        return values[v]
    aval: Any = v.aval
    return jnp.asarray(v.val, aval.dtype)
