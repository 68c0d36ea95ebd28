"""One name a leaf, the same in `init` and `update`, for every library that holds parameters."""

import collections
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

KeyPath = tuple[Any, ...]

# flax boxes (`nnx.Param`, `linen.Partitioned`) add this key to the path at `init`; `nnx.Optimizer`
# hands over bare arrays at `update`, so it cannot be part of a leaf's name.
_BOX = GetAttrKey("value")


def path_name(key_path: KeyPath) -> str:
    """The "/"-joined name of one JAX key path, without a trailing attribute `value`.

    Use `named_leaves` where you have the whole tree: it can tell a flax box from a module that
    has a field called `value` next to others.

    Dictionary keys, attributes and indices are joined; "" is the root. A ":" in a key counts as
    "/", so that leaves have the same names in a state, by `state_key`.

    >>> import jax
    >>> params = {"layers": [{"kernel": 1.0}]}
    >>> [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    ['layers/0/kernel']
    """
    boxed = len(key_path) > 0 and key_path[-1] == _BOX
    return _joined(key_path[:-1] if boxed else key_path)


def is_hole(leaf: Any) -> bool:
    """True where a tree has a position but no leaf: None, or optax's `MaskedNode`."""
    return leaf is None or is_masked(leaf)


def is_masked(leaf: Any) -> bool:
    """True for optax's `MaskedNode`, which stands for a leaf or for a whole subtree."""
    return type(leaf).__name__ == "MaskedNode"  # by name: this floor does not import optax


def named_positions(tree: Any) -> list[tuple[str, Any]]:
    """`named_leaves` plus the holes: the positions that hold None or `optax.MaskedNode`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)
    paths = [path for path, _ in flat]

    def name(path: KeyPath, *neighbours: KeyPath) -> str:
        # Flattening keeps siblings together, so a box, which has one child, shares its prefix with
        # neither neighbour; an attention module with fields query, key, value does.
        owner = path[:-1]
        if any(near[: len(owner)] == owner for near in neighbours):
            return _joined(path)
        return path_name(path)

    names = (
        name(path, *paths[max(i - 1, 0) : i], *paths[i + 1 : i + 2]) for i, path in enumerate(paths)
    )
    return list(zip(names, (leaf for _, leaf in flat), strict=True))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(name, leaf)` of the leaves of a tree, in the order of `jax.tree.leaves`.

    Of dictionaries, lists, flax (linen, nnx) or equinox parameters, concrete or abstract; None and
    `optax.MaskedNode` are no leaves. Names are unique unless a dictionary key itself holds a "/" or
    ":".

    >>> named_leaves({"dense": {"kernel": 1.0, "bias": None}, "scale": 2.0})
    [('dense/kernel', 1.0), ('scale', 2.0)]
    """
    return [(name, leaf) for name, leaf in named_positions(tree) if not is_hole(leaf)]


def state_key(name: str) -> str:
    """The name of a leaf as a key of a state: without "/", at which checkpoints split their keys.

    >>> state_key("layers/0/kernel")
    'layers:0:kernel'
    """
    return name.replace("/", ":")


def name_of_key(key: str) -> str:
    """The name of the leaf that `state_key` made a key of.

    >>> name_of_key("layers:0:kernel")
    'layers/0/kernel'
    """
    return key.replace(":", "/")


def state_keys(tree: Any) -> list[str]:
    """The `state_key` of each leaf of a tree, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: two leaves have the same name.

    >>> state_keys({"dense": {"kernel": 1.0, "bias": 2.0}})
    ['dense:bias', 'dense:kernel']
    """
    names = [name for name, _ in named_leaves(tree)]
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(f"two leaves have the path {name!r}: rename a key with a '/' or ':'")
    return [state_key(name) for name in names]


def _joined(key_path: KeyPath) -> str:
    return name_of_key(keystr(key_path, simple=True, separator="/"))


def map_named(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of `f(name, leaf, *rest_leaves)`; `tree` decides the structure and the names.

    >>> map_named(lambda name, x, y: f"{name}: {x + y}", {"a": 1, "b": None}, {"a": 2, "b": None})
    {'a': 'a: 3', 'b': None}
    """
    names = [name for name, _ in named_leaves(tree)]
    named = jax.tree.unflatten(jax.tree.structure(tree), names)
    return jax.tree.map(lambda leaf, name, *more: f(name, leaf, *more), tree, named, *rest)
