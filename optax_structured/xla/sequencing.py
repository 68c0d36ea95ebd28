"""Leaf after leaf, where the compiler would begin all of them at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optax_structured.xla.alike import traced_once


def zero_after(made: jax.Array, otherwise: jax.Array) -> jax.Array:
    """0, known when an array is, so that what it is added to waits for it.

    XLA for CPUs runs independent operations in any order, each with memory of its own: the
    temporaries of all leaves are then held at once. Accelerators do without; see `not_before`.

    Args:
      made: what is to come first; any floating-point or integer array.
      otherwise: a scalar 0; given back where nothing need wait.
    """
    axes = jax.typeof(made).sharding.mesh.axis_types
    if not made.size or any(axis != AxisType.Auto for axis in axes):
        return otherwise  # where sharding is part of types, leaves of other types could not wait

    return _zero_after((), made, otherwise)


@traced_once
def _zero_after(static: Any, made: jax.Array, otherwise: jax.Array) -> jax.Array:
    def wait(made: jax.Array, otherwise: jax.Array) -> jax.Array:
        first = made[(0,) * made.ndim].astype(jnp.float32)
        # Never true, which XLA does not know. The root is too expensive to recompute per consumer,
        # so that `made` is read once, and not held.
        return (jnp.sqrt(jnp.abs(first)) < -1).astype(otherwise.dtype)

    return jax.lax.platform_dependent(
        made, otherwise, cpu=wait, default=lambda _, otherwise: otherwise
    )


def not_before(made: jax.Array, x: Any) -> Any:
    """`x`, a tree of arrays, read on a TPU when `made` is there, and not before.

    There the sums over devices of one leaf run beside the work of others, with temporaries of their
    own: of `ramda` on LLaMA-7B for 256 chips 453 MB, and 185 MB in turn (docs/pods.md).
    """
    if AxisType.Manual in jax.typeof(made).sharding.mesh.axis_types:
        return x  # one barrier would make all of it vary over the devices
    return _not_before((), made, x)


@traced_once
def _not_before(static: Any, made: jax.Array, x: Any) -> Any:
    def barrier(made: jax.Array, x: Any) -> Any:
        return jax.lax.optimization_barrier((made, x))[1]

    return jax.lax.platform_dependent(made, x, tpu=barrier, default=lambda _, x: x)


def as_one(function: Callable[[Any], Any], x: Any, old: Any, taken: jax.Array) -> Any:
    """`function(x)` if taken, else `old`: what reads a part of the result waits for all of it.

    XLA for CPUs would rather compute an array twice than wait for it; it takes an opaque
    conditional for a unit. Without, 8-bit Adam holds four decoded leaves at once instead of two
    (tests/quantization/test_temporaries.py), and is no slower. Accelerators do without.

    Args:
      function: of a tree of arrays.
      x: the tree.
      old: another result of `function`, of the same types.
      taken: bool, (), of which XLA does not know the value.
    """

    def unit(x: Any, old: Any, taken: jax.Array) -> Any:
        return jax.lax.cond(taken, lambda x, _: function(x), lambda _, old: old, x, old)

    def select(x: Any, old: Any, taken: jax.Array) -> Any:
        return jax.tree.map(functools.partial(jax.lax.select, taken), function(x), old)

    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves((x, old)))
    if any(axis == AxisType.Explicit for mesh in meshes for axis in mesh.axis_types):
        return select(x, old, taken)
    return jax.lax.platform_dependent(x, old, taken, cpu=unit, default=select)
