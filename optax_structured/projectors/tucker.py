"""Tensors: one orthonormal factor an axis, and a small core."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like, product, repeated
from optax_structured.projectors.base import (
    Basis,
    Projector,
    Refit,
    check_count,
    check_rank,
    transpose,
    where_usable,
)
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import fix_signs, leading, magnitude
from optax_structured.projectors.products import fold, tensor
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

    def frame(self, shape: Sequence[int], axes: Axes, rank: Any) -> Frame:
        ndim = len(shape)
        axes = Axes(tuple(range(ndim - 1)), -1) if axes == Axes() and ndim > 2 else axes
        axes.check(shape)
        frame = Frame(tuple(shape), axes, ())
        sizes = [shape[axis] for axis in frame.tensor_axes]
        return dataclasses.replace(frame, rank=_ranks(rank, sizes, shape))

    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        frame = step.frame

        def fit(basis: Matrices, gradient: jax.Array) -> Matrices:
            whole = tensor(frame, gradient / repeated(magnitude(gradient), gradient))

            def direction(x: jax.Array, k: int) -> jax.Array:
                # (*batch, n_k, rest): the matrix of an axis against all others.
                first = jnp.moveaxis(x, k - len(basis), len(frame.batch))
                unfolded = first.reshape(*frame.batch, first.shape[len(frame.batch)], -1)
                gram = product(unfolded, transpose(unfolded))
                return fix_signs(leading(gram, basis[k].shape[-1]))

            def sweep(_: jax.Array, factors: Matrices) -> Matrices:
                for k in range(len(basis)):
                    better = direction(fold(whole, factors, k), k)
                    factors = (*factors[:k], better, *factors[k + 1 :])
                return factors

            start = tuple(direction(whole, k) for k in range(len(basis)))
            factors = jax.lax.fori_loop(0, self.sweeps, sweep, start)
            pairs = zip(factors, basis, strict=True)
            return tuple(like(new.astype(old.dtype), old) for new, old in pairs)

        return where_usable(fit, step)


def _ranks(rank: Any, sizes: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The rank of each compressed axis.

    Raises:
      TypeError, ValueError: a rank that is none of the kinds that `Tucker` takes.
    """
    if isinstance(rank, float):
        if not 0 < rank < 1:
            raise ValueError(f"a fractional rank must be above 0 and below 1, got {rank!r}")
        return fractional_rank(sizes, rank)
    ranks = rank if isinstance(rank, tuple) else (rank,) * len(sizes)
    for one in ranks:
        check_rank(one)
    if len(ranks) != len(sizes):
        raise ValueError(
            f"rank={rank!r} needs one int for each of the {len(sizes)} compressed axes of a leaf "
            f"of shape {tuple(shape)}"
        )
    return tuple(min(r, n) for r, n in zip(ranks, sizes, strict=True))


def fractional_rank(sizes: Sequence[int], fraction: float) -> tuple[int, ...]:
    """The ranks of a Tucker decomposition with `fraction` times the entries of the tensor."""
    entries, squares = math.prod(sizes), sum(n * n for n in sizes)
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection: the left side of the rule increases with c
        c = (low + high) / 2
        stored = c ** len(sizes) * entries + c * squares
        low, high = (c, high) if stored < fraction * entries else (low, c)
    return tuple(max(1, round(low * n)) for n in sizes)
