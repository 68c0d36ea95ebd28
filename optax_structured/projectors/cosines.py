r"""The orthonormal cosine basis: any of its columns, and the norms of all coordinates at once.

.. math:: C_{ij} = \sqrt{2/n}\,\cos\frac{\pi i (2 j + 1)}{2 n}, \qquad C_{0j} = \sqrt{1/n}

"dct3" is the basis of the columns of C (coordinates :math:`C^\top x`, the DCT-III), "dct2" that of
its rows (coordinates :math:`C x`, the DCT-II). C itself, n x n, is never built.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Kind = Literal["dct3", "dct2"]
MAX_SIZE = 46340  # the largest n with n * 2n below 2^32


def columns(size: int, chosen: jax.Array, kind: Kind, dtype: Any) -> jax.Array:
    r"""(\*batch, size, rank): the basis vectors with indices `chosen`, (\*batch, rank)."""
    place = jnp.arange(size, dtype=jnp.uint32)[:, None]
    index = chosen[..., None, :].astype(jnp.uint32)
    frequency, sample = (place, index) if kind == "dct3" else (index, place)
    # In integers the angle loses nothing: it is reduced to half a turn before it is rounded.
    turn = frequency * (2 * sample + 1) % (4 * size)
    turn = jnp.minimum(turn, 4 * size - turn)
    scale = jnp.where(frequency == 0, math.sqrt(1 / size), math.sqrt(2 / size)).astype(dtype)
    return scale * jnp.cos(turn.astype(dtype) * (math.pi / (2 * size)))


def coordinate_norms(x: jax.Array, kind: Kind, norm: Callable[[jax.Array], jax.Array]) -> jax.Array:
    r"""(\*batch, size): the norm of each coordinate of x, (\*batch, size, length), over the length.

    By one real FFT (Makhoul 1980), whose result is in another order: only the norms are sorted.
    """
    return _norms_dct2(x, norm) if kind == "dct2" else _norms_dct3(x, norm)


def _norms_dct2(x: jax.Array, norm: Callable[[jax.Array], jax.Array]) -> jax.Array:
    n = x.shape[-2]
    y = jnp.concatenate([x[..., 0::2, :], jnp.flip(x[..., 1::2, :], -2)], -2)
    spectrum = jnp.fft.rfft(y, axis=-2) * jnp.conj(_quarter_waves(n, x.dtype))
    # Coordinate k is the real part at k, and coordinate n - k the imaginary part there.
    first = norm(jnp.real(spectrum))
    second = norm(jnp.imag(spectrum[..., 1 : (n + 1) // 2, :]))
    norms = jnp.concatenate([first, jnp.flip(second, -1)], -1)
    return norms * jnp.where(jnp.arange(n) == 0, math.sqrt(1 / n), math.sqrt(2 / n)).astype(x.dtype)


def _norms_dct3(x: jax.Array, norm: Callable[[jax.Array], jax.Array]) -> jax.Array:
    n = x.shape[-2]
    half = n // 2 + 1
    mirrored = jnp.flip(x[..., n - half + 1 :, :], -2)
    mirrored = jnp.concatenate([jnp.zeros_like(x[..., :1, :]), mirrored], -2)
    scale = jnp.where(jnp.arange(half) == 0, math.sqrt(n), math.sqrt(n / 2)).astype(x.dtype)
    spectrum = jax.lax.complex(x[..., :half, :], -mirrored) * _quarter_waves(n, x.dtype)
    norms = norm(jnp.fft.irfft(spectrum * scale[:, None].astype(spectrum.dtype), n, axis=-2))
    index = jnp.arange(n)
    return norms[..., jnp.where(index % 2 == 0, index // 2, n - 1 - index // 2)]


def _quarter_waves(n: int, dtype: Any) -> jax.Array:
    """(n // 2 + 1, 1): exp(i pi k / 2n)."""
    angle = jnp.arange(n // 2 + 1, dtype=dtype)[:, None] * (math.pi / (2 * n))
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
