"""Inner products of trees, leaf by leaf: nothing is flattened, so shardings stay."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.trees.precision import at_least_float32, common_dtype, scalar_dtype


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees alike, in float32 at least.

    >>> print(dot({"w": jnp.ones(3), "b": 2.0}, {"w": jnp.ones(3), "b": 1.0}))
    5.0
    """
    dtype = scalar_dtype((a, b))

    def products(x: Any, y: Any) -> jax.Array:
        return jnp.sum(at_least_float32(x) * at_least_float32(y)).astype(dtype)

    return sum(jax.tree.leaves(jax.tree.map(products, a, b)), jnp.zeros((), dtype))


def norm(tree: Any) -> jax.Array:
    """The l2 norm of all leaves together, in float32 at least."""
    return jnp.sqrt(dot(tree, tree))


def rows_times(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Inner products (m,) of the rows of (m, *shape) with x, for any sharding of it.

    A contraction of sharded axes is refused under explicit meshes, a sum is not.
    """
    dtype = common_dtype(rows, x)
    return jnp.sum(rows.astype(dtype) * x.astype(dtype), axis=tuple(range(1, rows.ndim)))
