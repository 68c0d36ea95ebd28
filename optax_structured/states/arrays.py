"""The arrays of a state, each with its role."""

import functools
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from optax_structured.states.optax_roles import OPTAX, Roles
from optax_structured.states.roles import COUNTER, Role


class StateArray(NamedTuple):
    """One array of a state."""

    path: tuple[Any, ...]  # its key path
    array: Any  # concrete or abstract
    role: Role | None  # None: a floating-point array of which nothing is known
    holder: str  # the class of the state that it is a field of; "" outside of any
    field: str  # its name there; "" outside of any


def arrays_of(state: Any, more: Mapping[str, Roles] = MappingProxyType({})) -> list[StateArray]:
    """The arrays of a state, in the order of `jax.tree.leaves(state)`.

    A state says beside its fields what they are (`mu: FirstMoment`), and a table says it for the
    states of optax. Scalars, integers and keys are counters wherever they are.

    Args:
      state: of any transformation, concrete or abstract.
      more: roles by the name of a class and of its field, before those of class and table.

    Returns:
      One `StateArray` per array.

    >>> import optax
    >>> [array.role.name for array in arrays_of(optax.adam(1e-3).init(jnp.ones(3)))]
    ['counter', 'first_moment', 'second_moment']
    """
    return list(_walk(StateArray((), state, None, "", ""), more))


def _walk(node: StateArray, more: Mapping[str, Roles]) -> Iterator[StateArray]:
    array = node.array
    children = jax.tree.leaves_with_path(array, is_leaf=lambda child: child is not array)
    if [path for path, _ in children] == [()]:
        exact = not jnp.ndim(array) or not jnp.issubdtype(array.dtype, jnp.inexact)
        yield node._replace(role=COUNTER) if exact and node.role is None else node
        return
    kind: Any = type(array)
    holder = kind.__name__
    known = roles_beside(kind) or OPTAX.get(holder, {})
    if not known.keys() <= set(getattr(kind, "__annotations__", ())):
        known = {}  # another class of that name
    known = {**known, **more.get(holder, {})}
    for path, child in children:
        name = path[0].name if isinstance(path[0], GetAttrKey) else ""
        where = node._replace(path=node.path + path, array=child)
        if name and node.role is None:
            where = where._replace(holder=holder, field=name)
        yield from _walk(where._replace(role=known.get(name, node.role)), more)


@functools.cache
def roles_beside(state: Any) -> Roles:
    """What a class of states says beside its fields."""
    try:
        hints = typing.get_type_hints(state, include_extras=True)
    except Exception:  # annotations that cannot be evaluated say nothing
        return {}
    extras = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: x for name, found in extras.items() for x in found if isinstance(x, Role)}
