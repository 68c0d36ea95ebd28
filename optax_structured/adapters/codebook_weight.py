"""A matrix of codewords, and the gradient that prefers near ones."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Backward = Literal["proximal", "default"]
Forward = Literal["soft", "hard"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def codebook_weight(
    logits: jax.Array,
    codebook: jax.Array,
    scale: jax.Array,
    group: jax.Array,
    backward: Backward = "proximal",
    forward: Forward = "soft",
    smoothing: float = 1e-2,
) -> jax.Array:
    r"""A matrix whose entries choose among the codewords of the group of their row.

    .. math:: w_{ij} = \sum_k p_{ijk} c_{ik}, \qquad p = \operatorname{softmax}_k(L), \qquad
        c_{ik} = s_{g(i)} C_{g(i), k}

    or, hard, the codeword of the largest logit. With g the gradient in w, that of the logits is

    .. math:: g\, p_k (c_k - w) \;\text{(default)}, \qquad
        g\, p_k \frac{c_k - w}{(c_k - w)^2 + \varepsilon^2} \;\text{(proximal)}

    so that the proximal one prefers near codewords. It is bounded for :math:`\varepsilon > 0`.

    Args:
      logits: L, (m, n, K).
      codebook: C, (G, K).
      scale: s, (G,).
      group: g, (m,) int: the group of each row.
      backward: `"proximal"` or `"default"`.
      forward: `"soft"` or `"hard"`.
      smoothing: :math:`\varepsilon`, in units of the mean distance of neighbouring codewords of the
        row; 0 for none, with :math:`1/0 = 0`.

    Returns:
      w, (m, n).

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> logits, codebook = jnp.zeros((1, 1, 2)), jnp.array([[0.0, 1.0]])
      >>> oxs.adapters.codebook_weight(logits, codebook, jnp.ones(1), jnp.zeros(1, int))
      Array([[0.5]], dtype=float32)

    Reference: Yvinec et al., `JLCM <https://arxiv.org/abs/2309.17361>`_, 2024. **A reconstruction**
    from its abstract, figure 1 and reviews.
    """
    words = _words(codebook, scale, group)
    return _chosen(logits, words, forward)


def _forward(
    logits: Any, codebook: Any, scale: Any, group: Any, backward: Any, forward: Any, smoothing: Any
) -> Any:
    w = codebook_weight(logits, codebook, scale, group, backward, forward, smoothing)
    return w, (logits, codebook, scale, group, w)


def _backward(backward: Backward, forward: Forward, smoothing: float, kept: Any, g: Any) -> Any:
    logits, codebook, scale, group, w = kept
    words = _words(codebook, scale, group)
    p = jax.nn.softmax(logits, axis=-1)
    away = words[:, None, :] - w[..., None]
    if backward == "proximal":
        square = jnp.square(away) + jnp.square(smoothing * spacing(words))[:, None, None]
        # A distance that is all rounding is none.
        # What is all rounding in float64 counts as 0: the reciprocal of it means nothing.
        rounding = 1e-12 * jnp.max(jnp.abs(words), axis=-1)
        none = jnp.abs(away) <= rounding[:, None, None]
        away = jnp.where(none, 0.0, away / jnp.where(none, 1.0, square))
    used = p if forward == "soft" else _one_hot(logits)
    of_rows = jnp.einsum("ij,ijk->ik", g, used)
    count = codebook.shape[0]
    of_words = jax.ops.segment_sum(of_rows, group, count)
    d_codebook = scale[:, None] * of_words
    d_scale = jnp.sum(codebook * of_words, axis=-1)
    return g[..., None] * p * away, d_codebook, d_scale, np.zeros(group.shape, jax.dtypes.float0)


codebook_weight.defvjp(_forward, _backward)


def footprint_bits(rows: int, cols: int, entries: int, groups: int) -> int:
    """Bits of a stored matrix: codes, codebooks and scales of 32 bits each.

    Args:
      rows: m.
      cols: n.
      entries: K.
      groups: G, whose rows are contiguous; otherwise m ceil(log2 G) more.

    Returns:
      m n ceil(log2 K) + 32 G K + 32 G.

    Example:
      >>> footprint_bits(4, 6, 4, 1)
      208
    """
    return rows * cols * _bits(entries) + 32 * groups * (entries + 1)


def pack_codes(logits: jax.Array) -> np.ndarray:
    """The codewords that a trained matrix has chosen, in ceil(log2 K) bits each.

    Args:
      logits: (m, n, K), concrete.

    Returns:
      Bytes, m n ceil(log2 K) / 8 of them, rounded up; see `unpack_codes`.

    Example:
      >>> packed = pack_codes(jnp.eye(4).reshape(2, 2, 4))
      >>> packed.nbytes, unpack_codes(packed, (2, 2), 4).tolist()
      (1, [[0, 1], [2, 3]])
    """
    codes = np.argmax(logits, axis=-1).reshape(-1, 1)
    return np.packbits((codes >> np.arange(_bits(logits.shape[-1]))) & 1)


def unpack_codes(packed: np.ndarray, shape: tuple[int, int], entries: int) -> np.ndarray:
    """The choices of `pack_codes`: the weights are `codebook[group[:, None], codes]` times scale.

    Args:
      packed: from `pack_codes`.
      shape: (m, n).
      entries: K.

    Returns:
      The index of each codeword, (m, n).

    Example: see `pack_codes`.
    """
    bits = np.unpackbits(packed, count=math.prod(shape) * _bits(entries))
    return (bits.reshape(*shape, -1) << np.arange(_bits(entries))).sum(axis=-1)


def _bits(entries: int) -> int:
    return math.ceil(math.log2(entries))


def _words(codebook: jax.Array, scale: jax.Array, group: jax.Array) -> jax.Array:
    """The codewords of each row, (m, K)."""
    return (scale[:, None] * codebook)[group]


def _one_hot(logits: jax.Array) -> jax.Array:
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)


def _chosen(logits: jax.Array, words: jax.Array, forward: Forward) -> jax.Array:
    if forward == "hard":
        index = jnp.argmax(logits, axis=-1)
        return jnp.take_along_axis(words, index, axis=-1)
    return jnp.einsum("ijk,ik->ij", jax.nn.softmax(logits, axis=-1), words)


def spacing(words: jax.Array) -> jax.Array:
    """The mean distance of neighbouring codewords of each row, (m,)."""
    return (jnp.max(words, axis=-1) - jnp.min(words, axis=-1)) / (words.shape[-1] - 1)
