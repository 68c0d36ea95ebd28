"""Equal steps between the smallest and the largest entry of a group: INT8 and INT4."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_structured.quantization.blocks import in_blocks, out_of_blocks
from optax_structured.quantization.checks import check_bits, check_block
from optax_structured.quantization.codec import AffineCode, Codec
from optax_structured.quantization.packing import pack, unpack
from optax_structured.quantization.rounding import round_stochastically
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class Affine(Codec):
    r"""Group-wise integers: equal steps, and a zero point, so that 0 is a code exactly.

    For each group of consecutive entries (row-major; the last one may be shorter), and
    :math:`Q = 2^{bits} - 1`,

    .. math::
        z &= \text{round}\big(Q\, l / (l + h)\big), \qquad s = \max\big(l / z,\, h / (Q - z)\big) \\
        c &= \text{clip}(\text{round}(x / s) + z,\, 0,\, Q), \qquad \hat x = s\,(c - z)

    where entries lie between :math:`-l \le 0` and :math:`h \ge 0`, so that
    :math:`|\hat x - x| \le s/2` and what was decoded is encoded without loss; halves go to the even
    integer. Not for second moments: small ones become 0.

    Args:
      bits: 8, or 4 with two codes in a byte.
      group: entries of a group, at least 2; 256.
      published: the range of a group as in the code of Q-GaLore: of its entries alone, without 0,
        and at least 1e-5. A group that is all positive or all negative is then cut off.

    Raises:
      TypeError, ValueError: bits other than 4 and 8, or a group that is not an int of 2 or more.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> codec = oxs.Affine(bits=4, group=4)
      >>> encoded = codec.encode(jnp.array([-1.5, 0.0, 0.7, 6.0]))
      >>> print(codec.decode(encoded, (4,)), encoded.codes.nbytes)
      [-1.5  0.   0.5  6. ] 2

    Reference: Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024.
    """

    bits: int = 8
    group: int = 256
    published: bool = False

    def __post_init__(self) -> None:
        check_bits(self)
        check_block("group", self.group, self.bits)

    def encode(self, x: jax.Array, *, key: jax.Array | None = None, batch: int = 0) -> AffineCode:
        """The codes of an array.

        Args:
          x: any floating-point array. NaN counts as 0, infinity as half the largest finite number.
          key: round up or down at random, so that the expectation of an entry that is not an
            extreme of its group is the entry; None rounds to the nearest.
          batch: leading axes that no group crosses.
        """
        groups = in_blocks(jnp.nan_to_num(at_least_float32(x)), self.group, batch)
        half = jnp.finfo(groups.dtype).max / 2
        groups = jnp.clip(groups, -half, half)  # else a range may overflow
        low, high = jnp.min(groups, -1), jnp.max(groups, -1)
        top = 2**self.bits - 1
        if self.published:
            scale = jnp.maximum(high - low, 1e-5) / top
            zero = jnp.clip(-jnp.round(low / scale), 0, top)
        else:
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
            zero = jnp.round(top * (-low / jnp.where(high > low, high - low, 1)))
            # As fine as both ends allow, so that none is cut off and codes of codes are the same.
            scale = jnp.maximum(-low / jnp.maximum(zero, 1), high / jnp.maximum(top - zero, 1))
            scale = jnp.where(scale > 0, scale, 1)
            zero = jnp.round(-low / scale)
        steps = groups / scale[..., None]
        whole = jnp.round(steps) if key is None else round_stochastically(steps, key)
        codes = jnp.clip(whole + zero[..., None], 0, top).astype(jnp.uint8)
        codes = pack(codes) if self.bits == 4 else out_of_blocks(codes, x.shape, batch)
        return AffineCode(codes, scale, zero.astype(jnp.uint8))

    def decode(
        self, encoded: AffineCode, shape: Sequence[int] | None = None, *, batch: int = 0
    ) -> jax.Array:
        codes, scale, zero = encoded
        shape = codes.shape if shape is None else shape
        groups = unpack(codes) if self.bits == 4 else in_blocks(codes, self.group, batch)
        steps = groups.astype(scale.dtype) - zero[..., None].astype(scale.dtype)
        return out_of_blocks(steps * scale[..., None], shape, batch)
