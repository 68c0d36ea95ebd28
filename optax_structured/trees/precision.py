"""In which precision an optimizer accumulates: that of the parameters, float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in its own precision, float32 at least: that of every accumulator."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def scalar_dtype(tree: Any) -> Any:
    """The precision of scalars shared by all leaves: the widest of them, float32 at least."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(jax.tree.map(jnp.result_type, tree)))
