"""SVFit: the leading singular values of a weight, between frozen singular vectors."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.adapters.nodes import (
    Adapter,
    MatrixNode,
    check_axes,
    check_matrix,
    check_rank,
    from_the_end,
    matrix_of,
)
from optax_structured.meshes import placement
from optax_structured.trees import Axes
from optax_structured.trees.precision import at_least_float32, wide_dtype
from optax_structured.xla.by_matrix import by_matrix


class Triplets(NamedTuple):
    """The leading singular triplets of a weight."""

    left: jax.Array  # (*batch, inputs, r): function of the weight alone
    values: jax.Array  # (*batch, r): likewise, the largest first
    right: jax.Array  # (*batch, r, outputs): likewise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum(MatrixNode):
    r"""How far the leading singular values of one weight have moved.

    .. math:: W = W_0 + U_r \operatorname{diag}(d) V_r^\top \quad\text{or}\quad
        W_0 + U_r \operatorname{diag}(\sigma \circ d) V_r^\top

    Args:
      shift: d, (\*batch, r); zero at the start, so that it is exactly the pretrained weight.
      sides: inputs and outputs of the weight, which d does not tell.
      axes: of the weight.
      relative: whether d is in units of the singular values.

    Example: see `SVFit`.
    """

    shift: Any
    sides: tuple[int, int] = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})  # noqa: RUF009
    relative: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def made_for(self) -> tuple[int, ...]:
        return (*self.shift.shape[:-1], *self.sides)

    def constant(self, weight: jax.Array) -> Triplets:
        u, s, vt = _svd(weight, self.axes)
        r = self.shift.shape[-1]
        kept = Triplets(u[..., :r], s[..., :r], vt[..., :r, :])
        return Triplets(*jax.lax.stop_gradient(tuple(kept)))

    def merged(self, weight: jax.Array, constant: Triplets) -> jax.Array:
        left, values, right = constant
        d = self.shift * values if self.relative else self.shift
        update = placement.product(left * d[..., None, :], right)
        wide = at_least_float32(weight)
        return wide + self.axes.from_matrix(update, weight.shape).astype(wide.dtype)


@dataclasses.dataclass(frozen=True)
class SVFit(Adapter):
    r"""Trains the r largest singular values of a weight, r numbers per matrix.

    The gradient of value k is :math:`u_k^\top (\partial L / \partial W) v_k`. Since the vectors are
    orthonormal, a step of SGD is the step of full fine-tuning projected onto the span of the
    :math:`u_k v_k^\top`. Values may change sign and order. What is trained is their shift from
    the pretrained ones, so that weight decay pulls back to these.

    Args:
      rank: r; hundreds, up to the smaller side. Exactly one of `rank` and `energy` is given.
      energy: share of the sum of squared singular values that the kept ones must hold, in (0, 1];
        0.99 is usual. Needs concrete weights; of stacked weights, the largest such rank.
      relative: moves are in units of each value (as in SVF) instead of absolute.
      axes: as in `LoRA`.

    Raises:
      TypeError, ValueError: both or neither of rank and energy, or one out of range.

    Give `merge` the `constants`, or it computes an SVD of each weight every time.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 5.0))}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.SVFit(energy=0.8))
      >>> adapter["kernel"].shift  # 16 + 9 of 30
      Array([0., 0.], dtype=float32)

    Reference: Sun et al., `SVFit <https://arxiv.org/abs/2409.05926>`_, 2024. No code is published;
    that values are unconstrained and that the residual stays are our reading.
    """

    rank: int | None = None
    energy: float | None = None
    relative: bool = False
    axes: Axes = Axes()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        check_axes("SVFit", self.axes)
        if (self.rank is None) == (self.energy is None):
            raise ValueError(
                f"SVFit takes exactly one of rank and energy, got rank={self.rank!r} and "
                f"energy={self.energy!r}"
            )
        if self.rank is not None:
            check_rank("SVFit", self.rank)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"SVFit(energy=...) must be in (0, 1], got {self.energy!r}")

    def check(self, shape: Sequence[int]) -> None:
        check_matrix(self.axes, shape, self.rank or 1)

    def init(self, key: jax.Array, weight: Any) -> Spectrum:
        axes = from_the_end(self.axes, weight.shape)
        batch, inputs, outputs = matrix_of(axes, weight.shape)
        rank = self.rank or _rank_of_energy(weight, axes, self.energy or 1.0)
        shift = jnp.zeros((*batch, rank), wide_dtype(weight))
        return Spectrum(shift, (inputs, outputs), axes, self.relative)


def _svd(weight: jax.Array, axes: Axes) -> Any:
    matrix = axes.to_matrix(at_least_float32(weight))
    return by_matrix(lambda x: jnp.linalg.svd(x, full_matrices=False), matrix)


def _rank_of_energy(weight: Any, axes: Axes, energy: float) -> int:
    if isinstance(weight, jax.core.Tracer):
        raise ValueError(
            "SVFit(energy=...) reads the rank off the weight and cannot be traced: call "
            "adapters.init outside jit, or give a rank"
        )
    squares = np.square(np.asarray(_svd(weight, axes)[1], np.float64))
    kept = np.cumsum(squares, axis=-1)
    enough = kept >= energy * (1 - 1e-12) * kept[..., -1:]
    return int(np.max(np.argmax(enough, axis=-1), initial=0)) + 1
