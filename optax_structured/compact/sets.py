"""Which slices along each axis of an array are kept: one increasing index vector an axis."""

import numpy as np

Shape = tuple[int, ...]
Mask = np.ndarray  # bool, in the shape of the value
Sets = tuple[np.ndarray, ...]  # of one array that is kept, in part; None where nothing is


def everything(shape: Shape) -> Sets:
    """All slices along all axes."""
    return tuple(np.arange(n) for n in shape)


def hull(mask: Mask) -> Sets | None:
    """The smallest block that holds all marked entries: rows and columns of a smaller array."""
    if not mask.any():
        return None
    axes = range(mask.ndim)
    return tuple(np.flatnonzero(mask.any(axis=tuple(a for a in axes if a != k))) for k in axes)


def block(shape: Shape, sets: Sets | None) -> Mask:
    """The mask of a block."""
    mask = np.zeros(shape, bool)
    if sets is not None:
        mask[np.ix_(*sets)] = True
    return mask


def sizes(sets: Sets) -> Shape:
    """The shape of the smaller array."""
    return tuple(map(len, sets))


def is_everything(sets: Sets | None, shape: Shape) -> bool:
    return sets is not None and sizes(sets) == shape


def joined(first: Sets | None, second: Sets | None) -> Sets | None:
    """The smallest block that holds both."""
    if first is None or second is None:
        return second if first is None else first
    return tuple(np.union1d(a, b) for a, b in zip(first, second, strict=True))
