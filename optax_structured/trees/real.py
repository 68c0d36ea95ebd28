"""Complex leaves, for which the structures and metrics of this library are not defined."""

from typing import Any

import jax.numpy as jnp

from optax_structured.trees.paths import named_leaves


def check_real(element: str, tree: Any) -> None:
    """Raises ValueError for a tree with a complex leaf.

    >>> check_real("galore", {"phase": 1j})
    Traceback (most recent call last):
    ValueError: galore takes real leaves, and 'phase' is complex64: wrap the whole optimizer in \
optax.contrib.split_real_and_imaginary, which makes two real leaves of it
    """
    for name, leaf in named_leaves(tree):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"{element} takes real leaves, and {name!r} is {dtype.name}: wrap the whole "
                "optimizer in optax.contrib.split_real_and_imaginary, which makes two real leaves "
                "of it"
            )
