"""Subspace iteration, warm from the basis before: what SVD gives at a small part of its cost."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.low_rank.frames import Frame, matrix_where
from optax_structured.low_rank.projectors.base import Basis, OneSided, check_count
from optax_structured.low_rank.projectors.hashing import uniform
from optax_structured.low_rank.projectors.orthonormal import (
    ORTHONORMALIZE,
    Orthonormalize,
    check_orthonormalize,
)
from optax_structured.low_rank.projectors.range_finder import power_step
from optax_structured.trees.placement import like


@dataclasses.dataclass(frozen=True)
class SubspaceIteration(OneSided):
    r"""Steps of subspace iteration on the gradient, begun at the basis before.

    .. math:: P \leftarrow \operatorname{qr}(G\,G^\top P)

    The first fit begins at random numbers, seeded by the leaf's name. R has a positive
    diagonal, so columns keep their places and signs from fit to fit as far as the gradient does:
    flipping a column of the old basis flips that of the new one.

    A step costs two products with the gradient and a QR of rank columns. A gradient that is
    orthogonal to the whole basis does not say where to turn it, and counts as zero.

    Args:
      iterations: steps from a basis that was fitted before, at least 1; 1. One captures 99 % of the
        energy of an SVD or more where spectra decay, two come closer on flat ones.
      cold_iterations: steps at the first fit, at least 1; 3.
      orthonormalize: `"qr"` (default), Householder, orthonormal whatever the gradient; or
        `"cholesky"`, two passes of shifted Cholesky-QR after each product, which gather no sharded
        axis, but for dependent columns, where Householder takes over.

    Raises:
      ValueError: iterations that are not ints of at least 1, an unknown `orthonormalize`.

    Equals `SVD` up to the choice of basis in the limit of many iterations.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, projector=oxs.SubspaceIteration())
      >>> optimizer = oxs.galore(1e-2, spec)
      >>> state = optimizer.init({"kernel": jnp.zeros((8, 5))})

    Reference: Halko, Martinsson, Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2011.
    """

    idles = True
    iterations: int = 1
    cold_iterations: int = 3
    orthonormalize: Orthonormalize = "qr"

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, 1)
        check_count("cold_iterations", self.cold_iterations, 1)
        check_orthonormalize(self.orthonormalize)

    def init(self, frame: Frame, dtype: Any) -> Basis:
        zeros = super().init(frame, dtype)
        seed = jnp.asarray(zlib.crc32(frame.name.encode()), jnp.uint32)
        random = uniform(seed, zeros.shape[-2], frame.size, dtype) * (3 / frame.size) ** 0.5
        return jnp.broadcast_to(random, zeros.shape)

    def refit(
        self, frame: Frame, basis: Basis, gradient: jax.Array, fitted: jax.Array, seed: Any
    ) -> Basis:
        due = jnp.ones(frame.batch, bool)
        return self.refit_where(due, frame, basis, frame.turn(gradient), fitted, seed)[0]

    def refit_where(
        self,
        due: jax.Array,
        frame: Frame,
        basis: Basis,
        matrix: jax.Array,
        fitted: jax.Array,
        seed: Any,
    ) -> tuple[Basis, jax.Array]:
        """One loop for all cases, its length known only when it runs: one QR to compile.

        A gradient that is not finite, or zero, shows in the first product: that ends the loop, and
        the basis stays.
        """
        del seed
        step = functools.partial(
            power_step,
            orthonormalize=ORTHONORMALIZE[self.orthonormalize],
            turned=frame.side == "cols",
            between=self.orthonormalize == "cholesky",
        )
        narrow = matrix.dtype.itemsize < basis.dtype.itemsize

        def turn(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            left, old = carry
            # Tied to the basis, lest XLA widens it before the loop: at every step, that is.
            gradient = jax.lax.optimization_barrier((matrix, old))[0] if narrow else matrix
            new, peak = step(gradient, old)
            new = like(new.astype(old.dtype), old)
            usable = jnp.isfinite(peak) & (peak > jnp.finfo(peak.dtype).tiny)
            # `left - 1` is a negated constant for XLA, which its passes carry to and fro.
            after = jnp.where(usable, left + (-1), -1)
            if not frame.batch:
                return after, matrix_where(usable, new, old)
            active = left > 0
            return jnp.where(active, after, left), matrix_where(active & usable, new, old)

        def more(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.any(carry[0] > 0) if frame.batch else carry[0] > 0

        turns = jnp.where(fitted, self.iterations, self.cold_iterations)
        left, new = jax.lax.while_loop(more, turn, (jnp.where(due, turns, -1), basis))
        return new, left == 0
