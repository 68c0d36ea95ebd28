"""`jax.extend.core`, loaded where a program is first taken apart: with it comes all of Pallas."""

from collections.abc import Sequence
from typing import Any


def __getattr__(name: str) -> Any:
    from jax.extend import core

    return getattr(core, name)


def variables(operands: Sequence[Any]) -> list[Any]:
    """Those that are no constants."""
    from jax.extend.core import Literal

    return [v for v in operands if not isinstance(v, Literal)]


def evaluate(program: Any, equations: Sequence[Any], values: dict[Any, Any]) -> None:
    """Adds the results of some equations of a program to `values`, by their variables."""
    from jax.extend.core import ClosedJaxpr, DropVar, jaxpr_as_fun

    if not equations:
        return
    made = [v for e in equations for v in e.outvars if not isinstance(v, DropVar)]
    new = set(made)
    used = list(dict.fromkeys(v for e in equations for v in variables(e.invars) if v not in new))
    part = program.replace(constvars=[], invars=used, outvars=made, eqns=list(equations))
    run = jaxpr_as_fun(ClosedJaxpr(part, []))
    values.update(zip(made, run(*(values[v] for v in used)), strict=True))
