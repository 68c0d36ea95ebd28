"""Codecs that store arrays in 8 or 4 bits per entry, and optimizers on top of them."""

from optax_structured.quantization.affine import Affine
from optax_structured.quantization.codebooks import codebook
from optax_structured.quantization.codec import AffineCode, Codec, DynamicCode
from optax_structured.quantization.dynamic import Dynamic
from optax_structured.quantization.quantized import QuantizedState, quantized
from optax_structured.quantization.rounding import cast_stochastically, round_stochastically

__all__ = [
    "Affine",
    "AffineCode",
    "Codec",
    "Dynamic",
    "DynamicCode",
    "QuantizedState",
    "cast_stochastically",
    "codebook",
    "quantized",
    "round_stochastically",
]
