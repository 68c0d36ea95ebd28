"""Two 4-bit codes in a byte."""

import jax
import jax.numpy as jnp


def pack(codes: jax.Array) -> jax.Array:
    """(..., n / 2) bytes of (..., n) codes below 16: the first half of them in the low bits."""
    low, high = jnp.split(codes, 2, -1)
    return low | (high << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """(..., n) codes of (..., n / 2) bytes."""
    halves = (packed[..., None, :] >> jnp.array([[0], [4]], packed.dtype)) & 15
    return halves.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
