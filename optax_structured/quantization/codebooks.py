"""The numbers that the codes of `Dynamic` stand for, and tables that find the nearest of them."""

import functools
from typing import NamedTuple

import numpy as np

_MANTISSA = 23  # bits of float32
_KEPT = 7  # of them, that tell to within one border where a number lies
_LARGEST_RISE = 1.05  # by rounding, of an entry that is to come to 0 if it decays by a tenth


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
    """Finds the nearest number to a magnitude in [0, 1] from the bits of its float32.

    The leading bits tell where it lies to within one border between numbers, and select an entry;
    the rank of the number, its place among those that are not negative, is
    `entry + trailing bits >> shift + 1`: the sum carries above the border.
    """

    shift: int  # trailing bits
    first: int  # leading bits of entry 0; what is below rounds as its magnitudes do, all to one
    table: np.ndarray  # int32


@functools.cache
def nearest(
    bits: int, signed: bool, settling: bool = False, keep_positive: bool = False
) -> Nearest:
    """One table lookup and an addition instead of a search over all borders.

    Args:
      bits, signed: of the codebook.
      settling: borders no lower than what may rise to the next number.
      keep_positive: no magnitude rounds to 0.
    """
    numbers = codebook(bits, signed)
    numbers = numbers[numbers >= 0].astype(np.float64)
    border = (numbers[1:] + numbers[:-1]) / 2
    if settling:
        border = np.maximum(border, numbers[1:] / _LARGEST_RISE)
    border = border.astype(np.float32)
    if keep_positive:
        border[0] = 0
    shift = _MANTISSA - _KEPT
    lowest = border[border > 0][0]
    first, last = (int(np.float32(x).view(np.uint32)) >> shift for x in (lowest, 1.0))
    bucket = np.arange(first - 1, last + 2, dtype=np.uint32) << shift
    start, end = bucket.view(np.float32), (bucket | (2**shift - 1)).view(np.float32)
    rank = np.searchsorted(border, start)
    inside = np.searchsorted(border, end, side="right") - rank
    assert np.all(inside <= 1) and inside[0] == inside[-1] == 0
    border = np.append(border, np.float32(0))[rank].view(np.uint32) & (2**shift - 1)
    border = np.where(inside == 1, border, 2**shift)  # or none that trailing bits can reach
    return Nearest(shift, first - 1, ((rank + 1 << (shift + 1)) - 1 - border).astype(np.int32))
