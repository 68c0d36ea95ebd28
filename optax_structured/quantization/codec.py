"""What all codecs do."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.states.roles import Codes


class DynamicCode(NamedTuple):
    """An array in the codes of `Dynamic`."""

    codes: Codes[jax.Array]  # uint8, in the shape of the array; 4 bits (*lead, blocks, block / 2)
    absmax: Codes[jax.Array]  # (*lead, blocks) float32: the largest magnitude in each block


class AffineCode(NamedTuple):
    """An array in the codes of `Affine`."""

    codes: Codes[jax.Array]  # uint8, in the shape of the array; 4 bits (*lead, blocks, block / 2)
    scale: Codes[jax.Array]  # (*lead, groups) float32 or wider: the step between two codes
    zero: Codes[jax.Array]  # (*lead, groups) uint8: the code of 0


class Codec(abc.ABC):
    """A way to store arrays in few bits; subclasses are frozen dataclasses, `encode` is pure."""

    bits: int

    @abc.abstractmethod
    def encode(self, x: jax.Array) -> Any:
        """The codes of an array: a tuple of arrays.

        Args:
          x: any floating-point array. Infinity counts as the largest finite number.
        """

    @abc.abstractmethod
    def decode(self, encoded: Any, shape: Sequence[int] | None = None) -> jax.Array:
        """The array of its codes, float32 or wider.

        Args:
          encoded: what `encode` gave.
          shape: of the array; None for that of the codes, which at 4 bits does not tell.
        """


def is_encoded(x: Any) -> bool:
    """Whether a node of a state is an array in codes."""
    return isinstance(x, DynamicCode | AffineCode)


def is_mapped(x: Any) -> bool:
    """Whether a node is a `DynamicCode` of which Flax's `nnx.jit` has made a mapping."""
    if not isinstance(x, Mapping) or set(x) != set(DynamicCode._fields):
        return False
    return getattr(x["codes"], "dtype", None) == jnp.uint8
