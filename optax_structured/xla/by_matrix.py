"""Factorisations of batches of matrices: each whole on its device, on a CPU one at a time.

Backend: CPUs, where a program that factorises two batches at once can hang. It gains no speed.
It can go when tests/xla/test_by_matrix.py passes with `jnp.linalg.svd` of a batch itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from optax_structured.meshes.placement import on_explicit_mesh, whole_matrices


def by_matrix(f: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`f`, which factorises matrices one by one, on a batch of them, each whole on its device.

    On an explicit mesh not all factorisations of JAX take a sharded batch; each device then does
    its own.
    """
    alone = functools.partial(_one_by_one, f)
    if not on_explicit_mesh(x):
        return alone(x)
    x = whole_matrices(x)
    spec = jax.typeof(x).sharding.spec
    if all(axis is None for axis in spec):
        return alone(x)
    return jax.shard_map(alone, mesh=jax.typeof(x).sharding.mesh, in_specs=spec, out_specs=spec)(x)


def _one_by_one(f: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`f` on a batch of matrices: on a CPU never on two at once, under `vmap` neither.

    There jaxlib deals a batch out to the threads that run the program, and one of these threads
    waits for it. When each waits for a batch of its own, none is left to work: the program hangs.
    With several CPU devices there are more threads, and a batch may be sharded over the devices,
    which a loop over it would gather.
    """
    if jax.local_device_count("cpu") > 1:
        return f(x)
    single = jax.custom_batching.custom_vmap(f)

    @single.def_vmap
    def batch(size: int, in_batched: Any, x: jax.Array) -> Any:
        in_turn = functools.partial(jax.lax.map, single)
        out = jax.lax.platform_dependent(x, cpu=in_turn, default=jax.vmap(f))
        return out, jax.tree.map(lambda _: True, out)

    mapped: Any = jax.custom_jvp(single)
    mapped.defjvp(functools.partial(jax.jvp, f))
    for _ in x.shape[:-2]:
        mapped = jax.vmap(mapped)
    return mapped(x)
