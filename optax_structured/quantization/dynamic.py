"""The dynamic block-wise code of 8-bit optimizers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.quantization.blocks import beside, in_blocks, layout, lookup, out_of_blocks
from optax_structured.quantization.checks import check_bits, check_block
from optax_structured.quantization.codebooks import codebook, nearest
from optax_structured.quantization.codec import Codec, DynamicCode
from optax_structured.quantization.packing import pack, unpack
from optax_structured.xla.alike import traced_once


@dataclasses.dataclass(frozen=True)
class Dynamic(Codec):
    r"""Block-wise dynamic code: floating point with its few bits where a block needs them.

    Blocks of B consecutive entries (row-major; the last one may be shorter) share the largest
    magnitude :math:`a_b`, and an entry is the nearest number q of a fixed `codebook`:

    .. math:: a_b = \max_{i \in b} |x_i|, \qquad
        c_i = \arg\min_k \big| q_k - x_i / a_b \big|, \qquad \hat x_i = a_b\, q_{c_i}

    with ties to the lower code; NaN makes its block NaN. At 8 bits numbers reach down to
    :math:`3 \cdot 10^{-7} a_b`, and those above :math:`0.1\,a_b` are kept to 0.7 %, without sign
    to 0.35 %. Zero is a code of its own, and without a sign no positive entry is given it: a second
    moment that is rounded to zero makes a step :math:`(1-b_2)^{-1/2}` times too long.

    Args:
      bits: 8, or 4 with two codes in a byte.
      block: B, entries of a block, at least 2. Eight-bit libraries use 256; at 4 bits, 128.
      signed: whether entries may be negative; without a sign steps are half as wide, and a negative
        entry counts as 0.
      settling: never round up by more than 5 %, so that an entry that decays by a tenth a step, a
        first moment without a gradient, comes to 0 instead of staying where the steps of the code
        are wide. Changes codes below a tenth of the largest entry; `quantized` sets it.
      published: round as the eight-bit kernels do: a negative entry never becomes 0 (it takes the
        next code), a positive entry without sign may.

    Raises:
      TypeError, ValueError: bits other than 4 and 8, or a block that is not an int of 2 or more.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> codec = oxs.Dynamic(signed=False)
      >>> kept = codec.decode(codec.encode(jnp.array([1.0, 0.5, 1e-9, 0.0])))
      >>> print([f"{x:.3g}" for x in kept.tolist()])
      ['1', '0.497', '3.25e-07', '0']

    Reference: Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, ICLR 2022, with blocks of 2048; the library has 256. The
    codebook for other numbers of bits is the same construction.
    """

    bits: int = 8
    block: int = 256
    signed: bool = True
    settling: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        check_bits(self)
        check_block("block", self.block, self.bits)

    def encode(self, x: jax.Array) -> DynamicCode:
        return _encode(self, x)

    def decode(self, encoded: DynamicCode, shape: Sequence[int] | None = None) -> jax.Array:
        shape = encoded.codes.shape if shape is None else shape
        return _decode((self, tuple(shape)), encoded)

    def abstract(self, shape: Sequence[int]) -> DynamicCode:
        """The codes of an array of this shape, as shapes."""
        cut = layout(shape, self.block)
        codes = shape if self.bits == 8 else (*cut.lead, cut.blocks, cut.block // 2)
        like: Any = jax.ShapeDtypeStruct
        return DynamicCode(like(codes, jnp.uint8), like((*cut.lead, cut.blocks), jnp.float32))

    def _nearest(self, ratio: jax.Array, x: jax.Array) -> jax.Array:
        """The codes of entries, from their ratio to the largest of their block."""
        keep_positive = not self.signed and not self.published
        shift, first, table = nearest(self.bits, self.signed, self.settling, keep_positive)
        size = jax.lax.bitcast_convert_type(jnp.abs(ratio), jnp.int32)
        bucket = jnp.clip((size >> shift) - first, 0, len(table) - 1)
        entry, trailing = lookup(table, bucket), size & (2**shift - 1)
        if not self.signed:
            code = jnp.where(x > 0, (entry + trailing) >> (shift + 1), 0)
        else:
            # The lower code of two is the one of smaller magnitude above zero, of larger below.
            negative = x < 0
            rank = (entry + trailing + negative.astype(entry.dtype)) >> (shift + 1)
            if self.published:
                negative = jnp.signbit(x)  # the kernels look at the bit: -0.0 too
                rank = jnp.where(negative, jnp.maximum(rank, 1), rank)
            zero = 2 ** (self.bits - 1) - 1
            code = jnp.where(negative, jnp.maximum(zero - rank, 0), zero + rank)
        return code.astype(jnp.uint8)


@traced_once
def _encode(codec: Dynamic, x: jax.Array) -> DynamicCode:
    blocks = in_blocks(beside(x, codec.block), codec.block).astype(jnp.float32)
    # Infinity counts as the largest number: 0 times it would spoil the block.
    absmax = jnp.max(blocks, -1)
    if codec.signed:
        absmax = jnp.maximum(absmax, -jnp.min(blocks, -1))
    absmax = jnp.clip(absmax, 0, np.finfo(np.float32).max)
    codes = codec._nearest(blocks / jnp.where(absmax == 0, 1, absmax)[..., None], blocks)
    return DynamicCode(pack(codes) if codec.bits == 4 else out_of_blocks(codes, x.shape), absmax)


@traced_once
def _decode(static: tuple[Dynamic, tuple[int, ...]], encoded: DynamicCode) -> jax.Array:
    codec, shape = static
    codes, absmax = encoded
    blocks = unpack(codes) if codec.bits == 4 else in_blocks(codes, codec.block)
    numbers = lookup(codebook(codec.bits, codec.signed), blocks)
    return out_of_blocks(numbers * absmax[..., None], shape)
