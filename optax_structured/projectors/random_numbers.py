"""Random numbers by hashing: functions of a seed and a place, one cheap kernel each.

A refit needs a start in general position and a projection that its seed regenerates, not a
cryptographic generator, which would take longer to compile than the rest of the refit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.xla.alike import traced_once


def uniform(seed: jax.Array, rows: int, cols: int, dtype: Any) -> jax.Array:
    r"""(\*batch, rows, cols): numbers in [-1, 1), from seeds of shape batch, uint32."""
    return (_bits(seed, rows, cols).astype(jnp.float32) * 2.0**-31 - 1).astype(dtype)


def normal(seed: jax.Array, rows: int, cols: int, dtype: Any) -> jax.Array:
    r"""(\*batch, rows, cols): standard normal numbers, by Box and Muller."""
    radius = (_bits(seed, rows, cols).astype(jnp.float32) + 1) * 2.0**-32  # never 0
    angle = _bits(mix(seed), rows, cols).astype(jnp.float32) * 2.0**-32
    radius = jnp.sqrt(-2 * jnp.log(jnp.minimum(radius, 1.0)))
    return (radius * jnp.cos(2 * np.pi * angle)).astype(dtype)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of the 32-bit numbers in which every bit depends on every bit."""
    x = jnp.asarray(x, jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _bits(seed: Any, rows: int, cols: int) -> jax.Array:
    return _bits_of((rows, cols), jnp.asarray(seed, jnp.uint32))


@traced_once
def _bits_of(shape: tuple[int, int], seed: jax.Array) -> jax.Array:
    rows, cols = shape
    places = [jax.lax.broadcasted_iota(jnp.uint32, (rows, cols), axis) for axis in (0, 1)]
    place = (places[0] * jnp.uint32(cols) + places[1]) * jnp.uint32(0x9E3779B9)
    return mix(place + seed[..., None, None])
