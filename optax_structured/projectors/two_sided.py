"""Both sides at once: a rank x rank leaf."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import by_matrix, like, product
from optax_structured.projectors.base import Projector, transpose
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import fix_signs, singular_vectors


class Sides(NamedTuple):
    """The basis of `TwoSided`."""

    left: jax.Array  # (*batch, size, rank), singular vectors of the compressed axis; at a fit
    right: jax.Array  # (*batch, length, rank), those of the other axis; at a fit


@dataclasses.dataclass(frozen=True)
class TwoSided(Projector):
    r"""Leading singular vectors on both sides: GaLore's `full`.

    .. math:: G = U S V^\top, \qquad P = U_{:,\,:r}, \quad Q = V_{:,\,:r}, \qquad
        R = P^\top G\,Q, \quad \text{back } P N Q^\top

    R is (rank, rank): the smallest state, at the price of a second basis and of the least freedom.
    At the fit itself R is diagonal up to rounding, and the first step of an Adam inside makes full
    steps of that rounding. Signs as in `SVD`, on each side for itself.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, projector=oxs.projectors.TwoSided())
      >>> optimizer = oxs.galore(1e-2, spec)
      >>> state = optimizer.init({"kernel": jnp.zeros((8, 5))})

    Reference: Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
    """

    def numbers(self, frame: Frame) -> int:
        rank: int = frame.rank  # type: ignore[assignment]
        return frame.count * rank * (frame.size + frame.length + 2 * rank)

    def low_shape(self, frame: Frame) -> tuple[int, ...]:
        return (*frame.batch, frame.rank, frame.rank)  # type: ignore[arg-type]

    def init(self, frame: Frame, dtype: Any) -> Sides:
        left = jnp.zeros((*frame.batch, frame.size, frame.rank), dtype)
        right = jnp.zeros((*frame.batch, frame.length, frame.rank), dtype)
        return Sides(left, right)

    def refit(
        self, frame: Frame, basis: Sides, gradient: jax.Array, fitted: jax.Array, seed: jax.Array
    ) -> Sides:
        del fitted, seed
        u, vh = by_matrix(singular_vectors, gradient)

        def kept(vectors: jax.Array, old: jax.Array) -> jax.Array:
            return like(fix_signs(vectors[..., : frame.rank]).astype(old.dtype), old)

        return Sides(kept(u, basis.left), kept(transpose(vh), basis.right))

    def factors(self, frame: Frame, basis: Sides) -> Sides:
        return basis

    def project(self, frame: Frame, factors: Sides, matrix: jax.Array) -> jax.Array:
        return product(product(transpose(factors.left), frame.turn(matrix)), factors.right)

    def lift(self, frame: Frame, factors: Sides, low: jax.Array) -> jax.Array:
        return frame.turn(product(product(factors.left, low), transpose(factors.right)))
