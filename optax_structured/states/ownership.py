"""Which parameter an array of an optimizer state belongs to."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from optax_structured.trees.paths import is_hole, named_leaves, state_key

Owner = int | None  # position in `jax.tree.leaves(params)`; None: belongs to no single parameter

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def owners(tx: Any, state: Any, params: Any) -> list[Owner]:
    """The parameter that each array of an optimizer state belongs to, by its place in the state.

    `tx.init`, called with the placeholder of `optax.tree.map_params`, shows where a state holds
    trees shaped like the parameters (`mu`, `nu`). What is elsewhere belongs to no parameter
    (counters, random keys, hyperparameters), but for dictionaries by `state_key` of the parameters,
    as low-rank states have. So a parameter may be called `count` or `scale`.

    Args:
      tx: the transformation that the state belongs to.
      state: its state, concrete or abstract.
      params: the parameters that the state was made for, or gradients, which have their structure.

    Returns:
      One entry per array, in the order of `jax.tree.leaves(state)`: the position of its parameter
      in `jax.tree.leaves(params)`, or None.

    >>> import optax
    >>> params = {"bias": 1.0, "count": 2.0}
    >>> adam = optax.adam(1e-3)
    >>> owners(adam, adam.init(params), params)
    [None, 0, 1, 0, 1]
    """
    structure: Any = jax.tree.structure(params)
    positions = structure.unflatten(range(structure.num_leaves))
    keys = {state_key(name): i for i, (name, _) in enumerate(named_leaves(params))}
    try:
        parts = optax.tree.map_params(
            tx,
            lambda tree: _Owners(_like_params(tree, positions)),
            state,
            transform_non_params=lambda part: _Owners(_keyed(part, keys)),
            is_leaf=lambda _: True,  # whole trees, as their leaves may be codes or holes
        )
    except Exception:
        # A mask or label function, or a line search, that cannot take a placeholder: what a part of
        # the state looks like has to tell.
        if isinstance(positions, int):
            alike = (np.shape(x) == np.shape(params) != () for x in jax.tree.leaves(state))
            return [positions if same else None for same in alike]
        return list(_keyed(state, keys, positions))
    return [owner for part in jax.tree.leaves(parts) for owner in part.found]


class _Owners:
    """The owners of the arrays of one part of a state; a leaf for JAX."""

    def __init__(self, found: Iterable[Owner]) -> None:
        self.found = list(found)


def _like_params(tree: Any, positions: Any) -> Iterator[Owner]:
    """Of a tree shaped like the parameters, whose leaves are arrays, holes or tuples of codes."""
    if is_hole(tree):
        return
    if isinstance(positions, int):
        yield from (positions for _ in jax.tree.leaves(tree))
        return
    for child, inside in zip(_children(tree), _children(positions), strict=True):
        yield from _like_params(child, inside)


def _keyed(part: Any, keys: Mapping[Any, int], positions: Any = None) -> Iterator[Owner]:
    """Of any other part: finds dictionaries keyed by paths, and trees like `positions`, inside."""
    if isinstance(part, _INJECTED):
        for name, child in zip(part._fields, part, strict=True):
            inner = name == "inner_state"
            yield from _keyed(child, keys if inner else {}, positions if inner else None)
    elif positions is not None and _matches(part, positions):
        yield from _like_params(part, positions)
    elif isinstance(part, Mapping) and part.keys() <= keys.keys():
        for (key,), child in _children_with_path(part):
            yield from (keys[key.key] for _ in jax.tree.leaves(child))
    elif jax.tree_util.all_leaves([part]):
        yield None
    else:
        for child in _children(part):
            yield from _keyed(child, keys, positions)


def _matches(tree: Any, positions: Any) -> bool:
    """Whether a tree has the structure of the parameters, but for holes and codes."""
    if is_hole(tree):
        return True
    children, inside = _children(tree), _children(positions)
    if isinstance(positions, int):
        return jax.tree_util.all_leaves(children)
    return _one_level(tree) == _one_level(positions) and all(map(_matches, children, inside))


def _children_with_path(node: Any) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(node, is_leaf=lambda child: child is not node)


def _children(node: Any) -> list[Any]:
    return [child for _, child in _children_with_path(node)]


def _one_level(node: Any) -> Any:
    """Type and keys of one node of a tree."""
    return jax.tree.structure(node, is_leaf=lambda child: child is not node)
