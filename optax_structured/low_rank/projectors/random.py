"""Random projections that are never stored: a counter of draws is the whole basis."""

import dataclasses
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structured.low_rank.frames import Frame
from optax_structured.low_rank.projectors.base import (
    Basis,
    OneSided,
    check_count,
    transpose,
    widest,
)
from optax_structured.low_rank.projectors.orthonormal import householder


@dataclasses.dataclass(frozen=True)
class RandomProjection(OneSided):
    r"""A random matrix, drawn from a seed each time that it is needed.

    .. math:: P_{ij} \sim \mathcal N(0, 1/r), \qquad \text{or } P = \operatorname{qr}(\text{same})

    The state of a matrix is one int32, the number of the draw; each fit moves on to the next. Draws
    depend on the seed, the leaf's name and the place in its batch, and on no gradient.

    With the Gaussian :math:`\mathbb E\,P P^\top = I`: norms are kept on average, as APOLLO needs,
    but :math:`P P^\top` is no projection.

    Args:
      seed: an int of at least 0; 0.
      distribution: `"gaussian"` (default) or `"orthonormal"`, whose QR is paid at each step.

    Raises:
      ValueError: a negative seed, an unknown distribution.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, projector=oxs.RandomProjection(seed=1))
      >>> optimizer = oxs.apollo(1e-2, spec)
      >>> state = optimizer.init({"kernel": jnp.zeros((8, 5))})

    Reference: Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
    """

    seed: int = 0
    distribution: Literal["gaussian", "orthonormal"] = "gaussian"

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0)
        if self.distribution not in ("gaussian", "orthonormal"):
            raise ValueError(
                f"distribution must be 'gaussian' or 'orthonormal', got {self.distribution!r}"
            )

    @property
    def orthonormal(self) -> bool:
        return self.distribution == "orthonormal"

    def init(self, frame: Frame, dtype: Any) -> Basis:
        return jnp.zeros(frame.batch, jnp.int32)

    def refit(
        self, frame: Frame, basis: Basis, gradient: jax.Array, fitted: jax.Array, key: jax.Array
    ) -> Basis:
        del gradient, fitted, key
        return basis + 1

    def factors(self, frame: Frame, basis: Basis) -> jax.Array:
        # The generator is named, so that no global setting changes the matrix between two steps.
        root = jax.random.key(self.seed, impl="threefry2x32")
        root = jax.random.fold_in(root, zlib.crc32(frame.name.encode()))

        def draw(count: jax.Array, place: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(root, place), count)
            return jax.random.normal(key, (frame.size, frame.rank), jnp.float32)  # type: ignore[arg-type]

        normal = jax.vmap(draw)(basis.reshape(-1), jnp.arange(frame.count))
        normal = normal.reshape(*frame.batch, *normal.shape[1:]).astype(widest())
        matrix = householder(normal) if self.orthonormal else normal / normal.shape[-1] ** 0.5
        return transpose(matrix)
