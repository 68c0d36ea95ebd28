"""Checks of whole trees: the leaves known from `init`, and real ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.trees.paths import named_leaves


class AnotherTree(ValueError):
    """A tree that differs from the one that is known."""


def check_same_tree(element: str, given: Any, known: Any, whose: str = "init") -> None:
    """Raises ValueError unless `given` has the leaves of `known`, with their shapes.

    The message says that `element` was given another tree than that of `whose`.
    """
    before: Any = jax.tree.structure(known)
    if before == jax.tree.structure(given):
        shapes = zip(named_leaves(given), named_leaves(known), strict=True)
        found = [
            f"{name!r} has shape {np.shape(new)} and had {np.shape(old)}"
            for (name, new), (_, old) in shapes
            if np.shape(new) != np.shape(old)
        ]
        if not found:
            return
    else:
        new, old = ({name for name, _ in named_leaves(tree)} for tree in (given, known))
        found = [f"{name!r} is missing" for name in sorted(old - new)]
        found += [f"{name!r} is new" for name in sorted(new - old)]
        found = found or ["the containers differ"]
    raise another_tree(element, found, whose)


def another_tree(element: str, found: Sequence[str], whose: str = "init") -> AnotherTree:
    """The error that says how a tree differs from the one of `whose`.

    >>> print(another_tree("ldadam", ["'bias' is missing"]))
    ldadam was given another tree than that of init: 'bias' is missing. Call init with the \
parameters that are updated; leave leaves out with optax.masked or optax.partition
    """
    shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return AnotherTree(
        f"{element} was given another tree than that of {whose}: {shown}. Call init with the "
        "parameters that are updated; leave leaves out with optax.masked or optax.partition"
    )


def check_real(element: str, tree: Any, *, splits: bool = True) -> None:
    """Raises ValueError for a tree with a complex leaf.

    Args:
      element: who asks, for the message.
      tree: its leaves.
      splits: whether the wrapper of optax that splits leaves will do: it passes no extra arguments.

    >>> check_real("galore", {"phase": 1j})
    Traceback (most recent call last):
    ValueError: galore takes real leaves, and 'phase' is complex64: wrap the whole optimizer in \
optax.contrib.split_real_and_imaginary, which makes two real leaves of it
    """
    for name, leaf in named_leaves(tree):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            remedy = (
                "wrap the whole optimizer in optax.contrib.split_real_and_imaginary, which makes "
                "two real leaves of it"
                if splits
                else "make two real leaves of it, which the loss puts together"
            )
            raise ValueError(f"{element} takes real leaves, and {name!r} is {dtype.name}: {remedy}")
