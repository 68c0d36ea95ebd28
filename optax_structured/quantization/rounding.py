"""Rounding that is right on average."""

import jax
import jax.numpy as jnp


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    r"""One of the two integers around each entry, so that the expectation is the entry.

    .. math:: \lfloor x \rfloor + [u < x - \lfloor x \rfloor], \qquad u \sim U[0, 1)

    Args:
      x: any floating-point array.
      key: random key; the same on all replicas, or they drift apart.

    Returns:
      Whole numbers, in the dtype of x; whole entries stay.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.full(10_000, 0.25)
    >>> print(round_stochastically(x, jax.random.key(0)).mean().round(2))
    0.25
    """
    low = jnp.floor(x)
    return low + (draws(key, x) < x - low).astype(x.dtype)


def draws(key: jax.Array, x: jax.Array) -> jax.Array:
    """Draws from [0, 1), one per entry."""
    return jax.random.uniform(key, x.shape, x.dtype)


def cast_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    r"""Casts float32 to bfloat16, up or down at random so that the expectation is the entry.

    A bfloat16 weight absorbs no change below :math:`2^{-9}` of its size when it is rounded to the
    nearest; here it takes such changes occasionally. Sixteen random bits are added below those that
    stay, and the rest is cut off.

    Args:
      x: floating-point array, read as float32.
      key: random key; the same on all replicas, or they drift apart.

    Returns:
      The same shape, bfloat16. What bfloat16 can represent stays, and so do NaN and infinity.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.full(10_000, 1.001)
    >>> mean = cast_stochastically(x, jax.random.key(0)).astype(jnp.float32).mean()
    >>> print(f"{mean:.4f}")
    1.0010
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
