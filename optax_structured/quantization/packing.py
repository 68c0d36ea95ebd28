"""Two 4-bit codes in a byte."""

import jax
import jax.numpy as jnp


def pack(codes: jax.Array) -> jax.Array:
    """(..., n / 2) bytes of (..., n) codes below 16: the first half of them in the low bits."""
    low, high = jnp.split(codes, 2, -1)
    return low | (high << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """(..., n) codes of (..., n / 2) bytes."""
    return jnp.concatenate([packed & 15, packed >> 4], -1)
