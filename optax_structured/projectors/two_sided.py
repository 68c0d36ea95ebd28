"""Both sides at once: a rank x rank leaf."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from optax_structured.meshes.placement import like
from optax_structured.projectors.base import Basis, Projector, Refit, transpose, where_usable
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import fix_signs, singular_vectors
from optax_structured.trees import Axes
from optax_structured.xla.by_matrix import by_matrix


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

    def frame(self, shape: Sequence[int], axes: Axes, rank: Any) -> Frame:
        return dataclasses.replace(super().frame(shape, axes, rank), both=True)

    def init(self, frame: Frame, dtype: Any, name: str) -> Sides:
        return Sides(*super().init(frame, dtype, name))

    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        frame = step.frame

        def fit(basis: Sides, gradient: jax.Array) -> Sides:
            u, vh = by_matrix(singular_vectors, gradient)

            def kept(vectors: jax.Array, old: jax.Array) -> jax.Array:
                return like(fix_signs(vectors[..., : frame.rank]).astype(old.dtype), old)

            return Sides(kept(u, basis.left), kept(transpose(vh), basis.right))

        return where_usable(fit, step)
