"""Leaf after leaf, where the compiler would begin all of them at once."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def zero_after(made: jax.Array, otherwise: jax.Array) -> jax.Array:
    """0, known when an array is, so that what it is added to waits for it.

    XLA for CPUs runs independent operations in any order, each with memory of its own: the
    temporaries of all leaves are then held at once. Accelerators, which run one operation after
    the other, do without.

    Args:
      made: what is to come first; any floating-point or integer array.
      otherwise: a scalar 0; given back where nothing need wait.
    """
    axes = jax.typeof(made).sharding.mesh.axis_types
    if not made.size or any(axis != AxisType.Auto for axis in axes):
        return otherwise  # where sharding is part of types, leaves of other types could not wait

    def wait(made: jax.Array, otherwise: jax.Array) -> jax.Array:
        first = made[(0,) * made.ndim].astype(jnp.float32)
        # Never true, which XLA does not know. The root is too expensive to recompute per consumer,
        # so that `made` is read once, and not held.
        return (jnp.sqrt(jnp.abs(first)) < -1).astype(otherwise.dtype)

    return jax.lax.platform_dependent(
        made, otherwise, cpu=wait, default=lambda _, otherwise: otherwise
    )
