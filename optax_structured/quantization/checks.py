"""Checks of the settings of codecs, and errors that tell the leaf."""

import contextlib
from collections.abc import Iterator
from typing import Any


def check_bits(codec: Any) -> None:
    """Raises ValueError unless a codec has 4 or 8 bits."""
    if codec.bits not in (4, 8):
        raise ValueError(f"{type(codec).__name__} has 4 or 8 bits, got bits={codec.bits!r}")


def check_block(name: str, size: Any, bits: int) -> None:
    """Raises TypeError or ValueError unless so many entries can share a scale, and fill bytes."""
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{name} must be a Python int, a number of entries, got {size!r}")
    if size < 2:
        raise ValueError(f"{name} must be at least 2 entries, got {size!r}")
    if bits == 4 and size % 2:
        raise ValueError(f"{name} must be even at 4 bits, two codes per byte, got {size!r}")


@contextlib.contextmanager
def of_leaf(where: str, path: str) -> Iterator[None]:
    """Errors inside tell where they were met, and at which parameter."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where} {path!r}: {error}") from error
