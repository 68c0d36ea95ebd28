"""Slices of arrays by their original numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from optax_structured.compact.sets import Sets

Fetch = Callable[[int, Sets], Any]  # an operand by its place, its slices
Kept = Sequence[Sets | None]


def take(x: Any, axis: int, have: np.ndarray, want: np.ndarray) -> Any:
    """Slices along an axis by their original numbers; zeros where they are not there."""
    if len(have) == len(want) and (have == want).all():
        return x
    place = np.minimum(np.searchsorted(have, want), len(have) - 1)
    there = have[place] == want
    if there.all():
        low, high = place[0], place[-1] + 1
        if high - low == len(place) and (np.diff(place) == 1).all():
            return lax.slice_in_dim(x, low, high, axis=axis)
        return chosen(x, place, axis)
    if (
        there.any()
        and np.array_equal(have[place[there]], have)
        and (np.diff(np.flatnonzero(there)) == 1).all()
    ):
        before = int(np.argmax(there))
        return padded(x, axis, before, len(want) - before - int(there.sum()))
    x = padded(x, axis, 0, 1)
    return chosen(x, np.where(there, place, len(have)), axis)


def chosen(x: Any, places: np.ndarray, axis: int) -> Any:
    """Slices along an axis by their places in it."""
    index = (slice(None),) * axis + (places,)
    return x.at[index].get(mode="promise_in_bounds")


def padded(x: Any, axis: int, before: int, after: int) -> Any:
    """Zeros before and after along an axis."""
    widths = [(before, after, 0) if k == axis else (0, 0, 0) for k in range(x.ndim)]
    return lax.pad(x, np.zeros((), x.dtype), widths)


def one(kept: Kept) -> Sets:
    """The slices of the only result, or of all, where they are alike."""
    return next(sets for sets in kept if sets is not None)


def replaced(sets: Sets, axis: int, here: np.ndarray) -> Sets:
    """The same with other slices along one axis."""
    return tuple(here if k == axis else s for k, s in enumerate(sets))
