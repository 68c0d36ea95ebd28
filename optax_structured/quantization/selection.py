"""Which arrays of a state are stored in codes: its moments, by their roles."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_structured.states import StateArray, arrays_of
from optax_structured.states.roles import (
    CODES,
    COUNTER,
    CURVATURE,
    FIRST_MOMENT,
    SECOND_MOMENT,
    WIDE,
    Role,
)

Fields = Mapping[str, Mapping[str, str]]

_BY_NAME = {role.name: role for role in (FIRST_MOMENT, SECOND_MOMENT, CURVATURE, WIDE)}
_MEANING = (
    '"first_moment" averages gradients, "second_moment" averages or sums their squares and is '
    'never negative, "curvature" averages second derivatives, "wide" stays as it is'
)


def as_roles(fields: Fields) -> dict[str, dict[str, Role]]:
    """The roles that `fields=` of `quantized` names.

    Raises:
      ValueError: a name that is none.
    """
    for holder, names in fields.items():
        for field, name in names.items():
            if name not in _BY_NAME:
                raise ValueError(
                    f"quantized: fields calls {holder}.{field} {name!r}; give one of "
                    f"{', '.join(map(repr, _BY_NAME))}: {_MEANING}"
                )
    return {h: {f: _BY_NAME[name] for f, name in names.items()} for h, names in fields.items()}


def selected(state: Any, fields: Fields, large: Sequence[bool]) -> list[Role | None]:
    """The roles of the arrays that are stored in codes; None for those that stay.

    Args:
      state: the state of the inner transformation, abstract.
      fields: what the caller says of states that no table knows.
      large: which arrays are to be in codes, in the order of `jax.tree.leaves(state)`.

    Raises:
      ValueError: a large array of which nothing is known, large arrays that all have to stay, or
        fields that the state does not have.
    """
    arrays = arrays_of(state, as_roles(fields))
    _check_fields(arrays, fields)
    wanted = [array for array, is_large in zip(arrays, large, strict=True) if is_large]
    if unknown := [array for array in wanted if array.role is None]:
        raise ValueError(_explain_unknown(unknown, fields))
    moments = [array for array in wanted if array.role and not array.role.wide]
    staying = [array for array in wanted if array.role not in (COUNTER, WIDE)]
    if staying and not moments:
        raise ValueError(_explain_wide(staying))
    for array in moments:
        if jnp.issubdtype(array.array.dtype, jnp.complexfloating):
            raise ValueError(
                f"quantized: {_name(array)} is {array.array.dtype}, and codes hold real numbers; "
                "use quantized(optax.contrib.split_real_and_imaginary(inner))"
            )
    in_codes = {array.path for array in moments if jnp.issubdtype(array.array.dtype, jnp.floating)}
    return [array.role if array.path in in_codes else None for array in arrays]


def _name(array: StateArray) -> str:
    return f"{array.holder}.{array.field}"


def _check_fields(arrays: Iterable[StateArray], fields: Fields) -> None:
    there = {(array.holder, array.field) for array in arrays}
    for holder, names in fields.items():
        for field in names:
            if there and (holder, field) not in there:
                known = ", ".join(sorted({f"{h}.{f}" for h, f in there if h}))
                raise ValueError(
                    f"quantized: fields names {holder}.{field}, and the state of the inner "
                    f"transformation has only {known}"
                )


def _explain_unknown(unknown: Sequence[StateArray], fields: Fields) -> str:
    bare = [array for array in unknown if not array.holder]
    if bare:
        return (
            f"quantized: nothing is known of an array of shape {np.shape(bare[0].array)} in the "
            "state, which is no field of a class; make the state of that transformation a "
            "NamedTuple, and say in fields= what its fields are"
        )
    line: dict[str, dict[str, str]] = {holder: dict(names) for holder, names in fields.items()}
    for array in unknown:
        line.setdefault(array.holder, {})[array.field] = FIRST_MOMENT.name
    shapes = {_name(array): np.shape(array.array) for array in reversed(unknown)}
    told = ", ".join(f"{name} (shape {shape})" for name, shape in reversed(shapes.items()))
    pasted = repr(line).replace("'", '"')
    return (
        f"quantized: nothing is known of {told}; say what it is:\n"
        f"    oxs.quantized(inner, fields={pasted})\nwhere {_MEANING}"
    )


def _explain_wide(wide: Sequence[StateArray]) -> str:
    if all(array.role == CODES for array in wide):
        return (
            "quantized: the state of the inner transformation is in codes already, as that of "
            "q_galore or of another quantized is; put quantized around it once"
        )
    reasons: dict[str, dict[str, None]] = {}
    for array in wide:
        reasons.setdefault(array.role.wide if array.role else "", {})[_name(array)] = None
    told = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
    return (
        "quantized: nothing in the state of the inner transformation can be stored in few bits; "
        f"use it without quantized. {told}"
    )
