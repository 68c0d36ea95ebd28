"""Columns of one fixed cosine basis, chosen by how much of the gradient they carry."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like, repeated, whole_matrices
from optax_structured.projectors import cosines
from optax_structured.projectors.base import Basis, OneSided, Refit, transpose, where_usable, widest
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import magnitude
from optax_structured.trees import Axes


@dataclasses.dataclass(frozen=True)
class DCT(OneSided):
    r"""The columns of the orthonormal cosine basis in which the gradient has its largest norms.

    .. math:: S = Q^\top G, \qquad P = Q_{:,\,J}, \quad
        J = \operatorname{top}_r\big(\|S_{i,:}\|\big)_i

    The state of a matrix is the sorted indices J, int32; of the basis only the chosen columns are
    ever computed. With the L2 score P is the best of all choices of r columns and
    :math:`\|G - P P^\top G\|^2 \le (1 - r/\text{size})\|G\|^2`. Ties go to the lower index.

    The basis is fixed, so it cannot follow directions that are not cosines: on gradients it
    captures clearly less than `SubspaceIteration`, at a quarter to a half of its cost. Its use is
    what fixed columns give: indices for a state, and moments that move by indexing alone.

    Args:
      score: `"l1"` (default, published) or `"l2"`, the norm over the length.
      kind: Q. `"dct3"` (default): the columns of the DCT-II matrix C; `"dct2"`: its rows;
        `"matrix"`: columns where columns are compressed and rows where rows are, as Trion does.

    Raises:
      ValueError: an unknown score or kind; a compressed axis longer than 46340.

    Equals any orthonormal basis at full rank.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.dct_adamw(1e-2, oxs.LowRank(rank=2, projector=oxs.DCT(score="l2")))
      >>> state = optimizer.init({"kernel": jnp.zeros((8, 5))})

    Reference: Modoranu et al., `Trion and DCT-AdamW <https://arxiv.org/abs/2505.17967>`_, 2025. The
    released code keeps the indices in the order of their scores, so that moments change places
    between fits; here they are sorted.
    """

    stored = False
    score: Literal["l1", "l2"] = "l1"
    kind: Literal["dct3", "dct2", "matrix"] = "dct3"

    def __post_init__(self) -> None:
        if self.score not in ("l1", "l2"):
            raise ValueError(f"score must be 'l1' or 'l2', got {self.score!r}")
        if self.kind not in ("dct3", "dct2", "matrix"):
            raise ValueError(f"kind must be 'dct3', 'dct2' or 'matrix', got {self.kind!r}")

    def frame(self, shape: Sequence[int], axes: Axes, rank: Any) -> Frame:
        frame = super().frame(shape, axes, rank)
        if frame.size > cosines.MAX_SIZE:
            raise ValueError(
                f"DCT compresses axes of up to {cosines.MAX_SIZE} entries, got {frame.size} in a "
                f"leaf of shape {tuple(shape)}; compress the other side, or use another projector"
            )
        return frame

    def init(self, frame: Frame, dtype: Any, name: str) -> Basis:
        return jnp.zeros((*frame.batch, frame.rank), jnp.int32)

    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        frame = step.frame

        def fit(basis: Basis, gradient: jax.Array) -> Basis:
            scale = magnitude(gradient)

            def norm(x: jax.Array) -> jax.Array:
                if self.score == "l1":
                    return jnp.sum(jnp.abs(x), -1)
                # Scaled, the squares of any gradient are in range.
                return jnp.sqrt(jnp.sum((x / repeated(scale, x)) ** 2, -1))

            scores = cosines.coordinate_norms(whole_matrices(gradient), self._kind(frame), norm)
            _, chosen = jax.lax.top_k(scores, basis.shape[-1])
            return like(jnp.sort(chosen, axis=-1).astype(jnp.int32), basis)

        return where_usable(fit, step)

    def factors(self, frame: Frame, basis: Basis) -> jax.Array:
        return transpose(cosines.columns(frame.size, basis, self._kind(frame), widest()))

    def overlap(self, frame: Frame, old: Basis, new: Basis) -> jax.Array:
        return (new[..., :, None] == old[..., None, :]).astype(widest())

    def _kind(self, frame: Frame) -> cosines.Kind:
        if self.kind == "matrix":
            return "dct3" if frame.side == "cols" else "dct2"
        return self.kind
