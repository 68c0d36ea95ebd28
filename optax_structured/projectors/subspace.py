"""Subspace iteration, warm from the basis before: what SVD gives at a small part of its cost."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like
from optax_structured.projectors.base import Basis, OneSided, Refit, check_count
from optax_structured.projectors.frames import Frame, matrix_where
from optax_structured.projectors.orthonormal import (
    ORTHONORMALIZE,
    Orthonormalize,
    check_orthonormalize,
)
from optax_structured.projectors.random_numbers import uniform
from optax_structured.projectors.range_finder import power_step


@dataclasses.dataclass(frozen=True)
class SubspaceIteration(OneSided):
    r"""Steps of subspace iteration on the gradient, begun at the basis before.

    .. math:: P \leftarrow \operatorname{qr}(G\,G^\top P)

    The first fit begins at random numbers, seeded by the leaf's name. One step from there may miss
    some per cent of the energy at small ranks, so a new leaf is fitted at its first three steps,
    each time going on from the basis before.

    R has a positive diagonal, so columns keep their places and signs from fit to fit as far as the
    gradient does: flipping a column of the old basis flips that of the new one.

    A step costs two products with the gradient and a QR of rank columns. A gradient that is
    orthogonal to the whole basis gives no direction to rotate towards, and counts as zero.

    Args:
      iterations: steps of each fit, at least 1; 1. One captures 99 % of the energy of an SVD or
        more where spectra decay, two come closer on flat ones.
      first_fits: fits of a new leaf, one at each of its first steps, 1 to 127; 3. One is enough for
        ranks of a quarter of the size.
      orthonormalize: `"qr"` (default), Householder, orthonormal for any gradient; or
        `"cholesky"`, two passes of shifted Cholesky-QR after each product, which gather no sharded
        axis, but for dependent columns, where Householder takes over.

    Raises:
      ValueError: iterations or fits that are not ints in range, an unknown `orthonormalize`.

    Equals `SVD` up to the choice of basis in the limit of many iterations.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, projector=oxs.SubspaceIteration())
      >>> optimizer = oxs.galore(1e-2, spec)
      >>> state = optimizer.init({"kernel": jnp.zeros((8, 5))})

    Reference: Halko, Martinsson, Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2011.
    """

    iterations: int = 1
    first_fits: int = 3
    orthonormalize: Orthonormalize = "qr"

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, 1)
        check_count("first_fits", self.first_fits, 1, 127)
        check_orthonormalize(self.orthonormalize)

    def init(self, frame: Frame, dtype: Any, name: str) -> Basis:
        zeros = super().init(frame, dtype, name)
        seed = jnp.asarray(zlib.crc32(name.encode()), jnp.uint32)
        random = uniform(seed, zeros.shape[-2], frame.size, dtype) * (3 / frame.size) ** 0.5
        return jnp.broadcast_to(random, zeros.shape)

    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        """Judges a gradient, finite and not zero, by the first product: no pass of its own."""
        power = functools.partial(
            power_step,
            step.matrix,
            orthonormalize=ORTHONORMALIZE[self.orthonormalize],
            turned=step.frame.side == "cols",
            between=self.orthonormalize == "cholesky",
        )
        basis = step.basis
        new, peak = power(basis)
        for _ in range(self.iterations - 1):
            new, _ = power(new)
        usable = step.due & jnp.isfinite(peak) & (peak > jnp.finfo(peak.dtype).tiny)
        return matrix_where(usable, like(new.astype(basis.dtype), basis), basis), usable
