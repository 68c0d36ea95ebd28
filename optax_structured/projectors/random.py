"""Random projections that are never stored: the seed of a draw is the whole basis."""

import dataclasses
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structured.projectors.base import (
    Basis,
    OneSided,
    Refit,
    check_count,
    where_usable,
    widest,
)
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import orthonormal
from optax_structured.projectors.random_numbers import mix, normal
from optax_structured.xla.alike import traced_once


@dataclasses.dataclass(frozen=True)
class RandomProjection(OneSided):
    r"""A random matrix, drawn from a seed each time that it is needed.

    .. math:: P_{ij} \sim \mathcal N(0, 1/r), \qquad \text{or } P = \operatorname{qr}(\text{same})

    The state of a matrix is one uint32, the seed of its draw; each fit moves on to the next. Draws
    depend on `seed`, the leaf's name and the place in its batch, and on no gradient.

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

    stored = False
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

    def init(self, frame: Frame, dtype: Any, name: str) -> Basis:
        root = jnp.uint32(zlib.crc32(f"{self.seed} {name}".encode()))
        return mix(jnp.arange(frame.count, dtype=jnp.uint32).reshape(frame.batch) + root)

    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        return where_usable(lambda basis, gradient: basis + 1, step)

    def factors(self, frame: Frame, basis: Basis) -> jax.Array:
        return _drawn((frame.rank, frame.size, widest(), self.orthonormal), basis)


@traced_once
def _drawn(static: tuple[int, int, Any, bool], seed: jax.Array) -> jax.Array:
    rank, size, dtype, rotation = static
    drawn = normal(mix(seed), rank, size, dtype)
    return orthonormal(drawn) if rotation else drawn / rank**0.5
