"""Tensors: one orthonormal factor an axis, and a small core."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like, product, repeated, whole_matrices
from optax_structured.projectors.base import Projector, check_count, check_rank, transpose
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import fix_signs, leading, magnitude
from optax_structured.trees import Axes

Matrices = tuple[jax.Array, ...]  # F_k, (*batch, n_k, r_k)


@dataclasses.dataclass(frozen=True)
class Tucker(Projector):
    r"""Leading directions of every axis of a tensor: GaLore for convolutions.

    .. math:: R = G \times_1 F_1^\top \cdots \times_N F_N^\top, \qquad
        \text{back } N \times_1 F_1 \cdots \times_N F_N

    with :math:`F_k`, (n_k, r_k), orthonormal, from alternating sweeps (HOOI) that begin at the
    singular vectors of each unfolding (HOSVD). Signs as in `SVD`.

    The axes that `Axes` names as rows and columns are compressed, each for itself; with the
    default `Axes()` these are all axes of the leaf. The rank of `LowRank` is an int (of each axis,
    at most its length), a tuple with an int for each compressed axis, or a fraction f of the
    entries to keep, 0 < f < 1: :math:`r_k = \max(1, \operatorname{round}(c\,n_k))` where
    :math:`c^N \prod n_k + c \sum n_k^2 = f \prod n_k`.

    Args:
      sweeps: of alternation after the first guess, at least 0; 2. More change little.

    Raises:
      ValueError: sweeps that are not an int of at least 0; a rank that is none of the above.

    Equals `TwoSided` for a matrix, up to the choice of basis.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> spec = oxs.LowRank(rank=0.25, period=200, projector=oxs.projectors.Tucker())
      >>> optimizer = oxs.galore(1e-2, spec)
      >>> state = optimizer.init({"kernel": jnp.zeros((3, 3, 8, 16))})

    Reference: Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024. The released tensor
    path cannot be constructed and would return the projected gradient instead of the optimizer's
    output; this is what it was meant to be.
    """

    sweeps: int = 2

    def __post_init__(self) -> None:
        check_count("sweeps", self.sweeps, 0)

    def view(self, shape: Sequence[int], axes: Axes) -> Axes:
        ndim = len(shape)
        return Axes(tuple(range(ndim - 1)), -1) if axes == Axes() and ndim > 2 else axes

    def check(self, shape: Sequence[int], axes: Axes, rank: Any) -> None:
        axes = self.view(shape, axes)
        axes.check(shape)
        count = len(_split(axes, shape)[1])
        if isinstance(rank, float):
            if not 0 < rank < 1:
                raise ValueError(f"a fractional rank must be above 0 and below 1, got {rank!r}")
        elif isinstance(rank, tuple):
            for one in rank:
                check_rank(one)
            if len(rank) != count:
                raise ValueError(
                    f"rank={rank!r} needs one int for each of the {count} compressed axes of a "
                    f"leaf of shape {tuple(shape)}"
                )
        else:
            check_rank(rank)

    def rank(self, shape: Sequence[int], axes: Axes, rank: Any) -> tuple[int, ...]:
        _, compressed = _split(self.view(shape, axes), shape)
        sizes = [shape[axis] for axis in compressed]
        if isinstance(rank, float):
            return fractional_rank(sizes, rank)
        ranks = rank if isinstance(rank, tuple) else (rank,) * len(sizes)
        return tuple(min(r, n) for r, n in zip(ranks, sizes, strict=True))

    def numbers(self, frame: Frame) -> int:
        _, compressed = _split(frame.axes, frame.shape)
        ranks = _ranks(frame)
        factors = sum(frame.shape[axis] * r for axis, r in zip(compressed, ranks, strict=True))
        return frame.count * (factors + 2 * math.prod(ranks))

    def low_shape(self, frame: Frame) -> tuple[int, ...]:
        return (*frame.batch, *_ranks(frame))

    def init(self, frame: Frame, dtype: Any) -> Matrices:
        _, compressed = _split(frame.axes, frame.shape)
        pairs = zip(compressed, _ranks(frame), strict=True)
        return tuple(jnp.zeros((*frame.batch, frame.shape[axis], r), dtype) for axis, r in pairs)

    def refit(
        self, frame: Frame, basis: Matrices, gradient: jax.Array, fitted: jax.Array, seed: jax.Array
    ) -> Matrices:
        del fitted, seed
        tensor = _tensor(frame, gradient / repeated(magnitude(gradient), gradient))
        ranks = _ranks(frame)

        def direction(tensor: jax.Array, k: int) -> jax.Array:
            unfolded = _unfold(tensor, k - len(ranks), len(frame.batch))
            return fix_signs(leading(product(unfolded, transpose(unfolded)), ranks[k]))

        def sweep(_: jax.Array, factors: Matrices) -> Matrices:
            for k in range(len(ranks)):
                factors = (*factors[:k], direction(_fold(tensor, factors, k), k), *factors[k + 1 :])
            return factors

        start = tuple(direction(tensor, k) for k in range(len(ranks)))
        factors = jax.lax.fori_loop(0, self.sweeps, sweep, start)
        pairs = zip(factors, basis, strict=True)
        return tuple(like(new.astype(old.dtype), old) for new, old in pairs)

    def factors(self, frame: Frame, basis: Matrices) -> Matrices:
        return basis

    def project(self, frame: Frame, factors: Matrices, matrix: jax.Array) -> jax.Array:
        return _fold(_tensor(frame, frame.turn(matrix)), factors)

    def lift(self, frame: Frame, factors: Matrices, low: jax.Array) -> jax.Array:
        tensor = _fold(low, tuple(transpose(factor) for factor in factors))
        batch, compressed = _split(frame.axes, frame.shape)
        order = batch + compressed
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return frame.axes.to_matrix(jnp.transpose(tensor, inverse))


def fractional_rank(sizes: Sequence[int], fraction: float) -> tuple[int, ...]:
    """The ranks of a Tucker decomposition with `fraction` times the entries of the tensor."""
    entries, squares = math.prod(sizes), sum(n * n for n in sizes)
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection: the left side of the rule increases with c
        c = (low + high) / 2
        stored = c ** len(sizes) * entries + c * squares
        low, high = (c, high) if stored < fraction * entries else (low, c)
    return tuple(max(1, round(low * n)) for n in sizes)


def _ranks(frame: Frame) -> tuple[int, ...]:
    assert isinstance(frame.rank, tuple)
    return frame.rank


def _split(axes: Axes, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch axes and compressed axes of a leaf, each in its order there."""
    batch, rows, cols = axes.split(shape)
    return batch, tuple(sorted(rows + cols))


def _tensor(frame: Frame, oriented: jax.Array) -> jax.Array:
    r"""(\*batch, n_1, ..., n_N), whole on every device but for the batch."""
    batch, compressed = _split(frame.axes, frame.shape)
    return jnp.transpose(frame.restore(whole_matrices(oriented)), batch + compressed)


def _fold(tensor: jax.Array, factors: Matrices, skip: int | None = None) -> jax.Array:
    """Contracts each of the last axes but `skip` with the rows of its factor."""
    for k, factor in enumerate(factors):
        if k != skip:
            axis = k - len(factors)
            last = jnp.moveaxis(tensor, axis, -1)
            rows = last.reshape(*factor.shape[:-2], -1, last.shape[-1])
            folded = product(rows, factor).reshape(*last.shape[:-1], factor.shape[-1])
            tensor = jnp.moveaxis(folded, -1, axis)
    return tensor


def _unfold(tensor: jax.Array, axis: int, batch: int) -> jax.Array:
    r"""(\*batch, n_k, rest): the matrix of an axis against all others."""
    first = jnp.moveaxis(tensor, axis, batch)
    return first.reshape(*first.shape[: batch + 1], -1)
