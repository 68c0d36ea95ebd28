"""In which precision an optimizer accumulates: that of the parameters, float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def common_dtype(*arrays: Any) -> Any:
    """The precision that holds all of these arrays, also where JAX is told not to promote."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def wide_dtype(*arrays: Any) -> Any:
    """The precision of these arrays together, float32 at least."""
    return common_dtype(*arrays, jnp.float32)


def at_least_float32(x: ArrayLike) -> jax.Array:
    """`x` in its own precision, float32 at least: that of every accumulator."""
    return jnp.asarray(x, wide_dtype(x))


def finite(x: jax.Array) -> jax.Array:
    """`x` with zero for NaN and infinities."""
    # `jnp.where` is a function of its own, which would be compiled into each of its callers.
    return jax.lax.select(jnp.isfinite(x), x, jnp.zeros_like(x))


def scalar_dtype(tree: Any) -> Any:
    """The precision of scalars shared by all leaves: the widest of them, float32 at least."""
    return wide_dtype(*jax.tree.leaves(jax.tree.map(jnp.result_type, tree)))
