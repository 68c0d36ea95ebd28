"""The numbers that the codes of `Dynamic` stand for, and tables that find the nearest of them."""

import functools
from typing import NamedTuple

import numpy as np

_MANTISSA = 23  # bits of float32
_LARGEST_RISE = 1.05  # by rounding, of an entry that is to come to 0 if it decays by a tenth
_KEPT = 7  # of them, that tell to within one midpoint where a number lies


@functools.cache
def codebook(bits: int = 8, signed: bool = True) -> np.ndarray:
    r"""The numbers of a dynamic code, sorted, float32: few steps per decade below, many above.

    Decade i of :math:`b-1`, counted from 0, has :math:`k = 2^i` numbers of each sign, or
    :math:`2^{i+1}` where there is no sign: the midpoints of k equal parts of :math:`[0.1, 1]`,
    times :math:`10^{i-b+2}`; and there are 0 and 1. For 8 bits these are the published ones.

    >>> codebook(4, signed=False)[:4]
    array([0.     , 0.00325, 0.00775, 0.02125], dtype=float32)
    """
    positive = [0.0, 1.0]
    for i in range(bits - 1):
        parts = 2**i if signed else 2 ** (i + 1)
        positive.extend(np.float32(10.0 ** (i - bits + 2)) * _midpoints(parts))
    numbers = np.sort(np.array(positive, np.float32))
    if signed:
        numbers = np.concatenate([-numbers[-2:0:-1], numbers])  # there is no -1
    return numbers


def _midpoints(parts: int) -> np.ndarray:
    """Of `parts` equal parts of [0.1, 1], rounded as the published float32 construction does."""
    low, high = np.float32(0.1), np.float32(1)
    step = np.float64(np.float32((high - low) / np.float32(parts)))
    i = np.arange(parts + 1)
    up, down = np.float64(low) + step * i, np.float64(high) - step * (parts - i)
    edges = np.where(i < (parts + 1) // 2, up, down).astype(np.float32)
    return (edges[1:] + edges[:-1]) / np.float32(2)


class Nearest(NamedTuple):
    """Finds the nearest number to a magnitude in [0, 1] by its leading bits."""

    shift: int  # that leaves the leading bits of a float32
    first: int  # leading bits of the smallest bucket
    rank: np.ndarray  # int32: numbers above 0 that are below all of a bucket, or next to it
    threshold: np.ndarray  # float32: the only border in the bucket, above it the rank is 1 more


@functools.cache
def nearest(bits: int, signed: bool, settling: bool = False) -> Nearest:
    """Two table lookups and a comparison take the place of a search over all midpoints."""
    numbers = codebook(bits, signed)
    numbers = numbers[numbers >= 0].astype(np.float64)
    middle = (numbers[1:] + numbers[:-1]) / 2
    if settling:
        middle = np.maximum(middle, numbers[1:] / _LARGEST_RISE)
    middle = middle.astype(np.float32)
    shift = _MANTISSA - _KEPT
    first, last = (int(np.float32(x).view(np.uint32)) >> shift for x in (middle[0], 1.0))
    bucket = np.arange(first, last + 1, dtype=np.uint32) << shift
    start, end = bucket.view(np.float32), (bucket | (2**shift - 1)).view(np.float32)
    rank = np.searchsorted(middle, start)
    assert np.all(np.searchsorted(middle, end, side="right") - rank <= 1)
    threshold = np.append(middle, np.float32(np.inf))[rank]
    return Nearest(shift, first, rank.astype(np.int32), threshold)
