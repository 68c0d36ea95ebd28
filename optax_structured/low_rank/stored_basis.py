"""A basis as it is stored: itself, or in codes."""

from typing import Any

import jax

from optax_structured.meshes.placement import whole, whole_matrices
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
    batch = len(frame.batch)
    stored = jax.tree.map(lambda x: whole(x, range(batch, x.ndim)), stored)
    sides = (frame.size, frame.rank) if frame.side == "rows" else (frame.rank, frame.size)
    beside = spec.codec.decode(stored, (*frame.batch, *sides), batch=batch)
    return transpose(frame.turn(beside))
