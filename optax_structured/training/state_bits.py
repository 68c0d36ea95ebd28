"""Optimizer state in 32, 8 or 4 bits per entry: what `--state-bits` stands for."""

from typing import Any

from optax_structured.quantization import Dynamic, quantized
from optax_structured.training.peers import KNOWN

_CODECS = {32: None, 8: Dynamic(8, block=256), 4: Dynamic(4, block=128)}
_CHOICES = ", ".join(map(str, _CODECS))
HELP = f"Bits of an entry of a moment: one of {_CHOICES}; default 32, or 8 for q_galore"


def default_state_bits(recipe: str) -> int:
    """Bits of the moments of a recipe, as published."""
    return KNOWN[recipe].state_bits


def codec_of(state_bits: Any) -> Dynamic | None:
    """The codec of moments of so many bits; None for float32.

    Raises:
      ValueError: there is none.
    """
    if state_bits not in _CODECS:
        raise ValueError(f"state_bits must be one of {_CHOICES}, got {state_bits!r}")
    return _CODECS[state_bits]


def in_words(state_bits: int) -> str:
    """For a list of settings; nothing for float32."""
    return "" if state_bits == 32 else f"{state_bits}-bit state"


def folder_name(recipe: str, state_bits: int) -> str:
    """A recipe in the name of a run folder."""
    return recipe if state_bits == default_state_bits(recipe) else f"{recipe}-{state_bits}bit"


def made(recipe: str, codec: Dynamic | None, *args: Any, **settings: Any) -> Any:
    """The optimizer of a recipe, with its moments in a codec."""
    make, takes = KNOWN[recipe].make, KNOWN[recipe].takes
    if takes("moments"):
        return make(*args, moments=codec, **settings)
    optimizer = make(*args, **settings)
    return optimizer if codec is None else quantized(optimizer, codec)
