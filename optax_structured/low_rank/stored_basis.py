"""A basis as it is stored: itself, or in codes."""

from typing import Any

from optax_structured.meshes.placement import whole_matrices
from optax_structured.projectors.base import transpose
from optax_structured.projectors.frames import Frame


def encoded(spec: Any, frame: Frame, basis: Any) -> Any:
    """A basis as stored: itself, or in codes, oriented like the matrix."""
    if spec.codec is None:
        return basis
    beside = whole_matrices(frame.turn(transpose(basis)))
    return spec.codec.encode(beside, batch=len(frame.batch))


def decoded(spec: Any, frame: Frame, stored: Any) -> Any:
    """The basis of what is stored."""
    if spec.codec is None:
        return stored
    sides = (frame.size, frame.rank) if frame.side == "rows" else (frame.rank, frame.size)
    beside = spec.codec.decode(stored, (*frame.batch, *sides), batch=len(frame.batch))
    return transpose(frame.turn(beside))
