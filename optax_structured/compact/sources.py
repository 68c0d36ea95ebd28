"""Where each entry of a moved array comes from; both passes read zeros and needs off that."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Shape

# The entries of the operands, numbered through, in the shapes of the operands -> those of the
# results, by the same numbers.
Move = Callable[[dict[str, Any], list[np.ndarray], list[Shape]], list[np.ndarray]]


def sources(equation: Equation, before: Sequence[Shape], after: Sequence[Shape]) -> list[Any]:
    """For each result, the number of the entry that each of its entries is."""
    numbers, count = [], 0
    for shape in before:
        size = math.prod(shape)
        numbers.append(np.arange(count, count + size).reshape(shape))
        count += size
    return _MOVES[equation.name](equation.params, numbers, list(after))


def _broadcast(params: dict[str, Any], x: list[np.ndarray], after: list[Shape]) -> list[np.ndarray]:
    view = [1] * len(after[0])
    for k, n in zip(params["broadcast_dimensions"], x[0].shape, strict=True):
        view[k] = n
    return [np.broadcast_to(x[0].reshape(view), after[0])]


def _pad(params: dict[str, Any], x: list[np.ndarray], after: list[Shape]) -> list[np.ndarray]:
    result = np.full(after[0], x[1])
    here, there = [], []
    for n, m, (low, _, inner) in zip(x[0].shape, after[0], params["padding_config"], strict=True):
        at = low + np.arange(n) * (inner + 1)
        inside = (at >= 0) & (at < m)
        here.append(np.flatnonzero(inside))
        there.append(at[inside])
    result[np.ix_(*there)] = x[0][np.ix_(*here)]
    return [result]


def _slice(params: dict[str, Any], x: list[np.ndarray], after: list[Shape]) -> list[np.ndarray]:
    steps = params["strides"] or (1,) * x[0].ndim
    limits = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return [x[0][tuple(slice(*s) for s in limits)]]


_MOVES: dict[str, Move] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda params, x, _: [np.concatenate(x, axis=params["dimension"])],
    "pad": _pad,
    "reshape": lambda _, x, after: [x[0].reshape(after[0])],
    "rev": lambda params, x, _: [np.flip(x[0], params["dimensions"])],
    "slice": _slice,
    "split": lambda params, x, _: np.split(
        x[0], np.cumsum(params["sizes"])[:-1], axis=params["axis"]
    ),
    "squeeze": lambda _, x, after: [x[0].reshape(after[0])],
    "stack": lambda params, x, _: [np.stack(x, axis=params["axis"])],
    "tile": lambda params, x, _: [np.tile(x[0], params["reps"])],
    "transpose": lambda params, x, _: [np.transpose(x[0], params["permutation"])],
    "unstack": lambda params, x, _: list(np.moveaxis(x[0], params["axis"], 0)),
}
