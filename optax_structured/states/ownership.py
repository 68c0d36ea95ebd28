"""Which parameter an array of an optimizer state belongs to."""

from typing import Any

import jax
from jax.tree_util import DictKey

from optax_structured.trees.paths import KeyPath, named_leaves


def owned_leaves(state: Any, params: Any) -> list[tuple[str | None, Any]]:
    """The leaves of an optimizer state, each with the name of the parameter it belongs to.

    A state holds trees shaped like the parameters (`mu`, `nu`), or dictionaries by the name of the
    parameter (the low-rank state): the key path of a state leaf contains that of its parameter, or
    its name. The longest match decides, so that `a/kernel` is not taken for a leaf `kernel`.

    Args:
      state: of any transformation, concrete or abstract.
      params: the parameters it was made for.

    Returns:
      `(name, leaf)` pairs in the order of `jax.tree.leaves(state)`; None where no parameter is
      named: counters, random keys, constants.

    >>> import optax
    >>> params = {"kernel": 1.0}
    >>> [name for name, _ in owned_leaves(optax.adam(1e-3).init(params), params)]
    [None, 'kernel', 'kernel']
    """
    known: dict[KeyPath, str] = {}
    names = [name for name, _ in named_leaves(params)]
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    for name, path in zip(names, paths, strict=True):
        known[(DictKey(name),)] = name
        known[path] = name
    return [(_owner(path, known), leaf) for path, leaf in jax.tree.leaves_with_path(state)]


def _owner(path: KeyPath, known: dict[KeyPath, str]) -> str | None:
    for length in range(len(path), -1, -1):
        for start in range(len(path) - length, -1, -1):
            if (part := path[start : start + length]) in known:
                return known[part]
    return None
