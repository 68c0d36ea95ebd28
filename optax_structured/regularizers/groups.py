"""What regularizers of groups share: which axes number the groups, and their norms."""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer
from optax_structured.trees.axes import AxisLike, group_view
from optax_structured.trees.checks import check_positive
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class OnGroups(Regularizer):
    """A regularizer of groups of entries: there is one per index of an axis.

    There is one group per index of `group_axis` (and of `batch_axis`, whose indices number
    independent copies); all other axes are inside the group.

    Args:
      group_axis: the axis, or axes, that number the groups; negative ones count from the end.
        `()` takes the whole leaf (of each batch index) as one group.
      batch_axis: axes along which layers are stacked (`nn.scan`, heads); default none.
    """

    group_axis: AxisLike
    _: dataclasses.KW_ONLY
    batch_axis: AxisLike = ()

    def __post_init__(self) -> None:
        for name, axes in (("group_axis", self.group_axis), ("batch_axis", self.batch_axis)):
            try:
                for axis in axes if isinstance(axes, tuple) else (axes,):
                    operator.index(axis)
            except TypeError:
                raise TypeError(f"{name} must be an int or a tuple of ints, got {axes!r}") from None

    def check(self, shape: tuple[int, ...]) -> None:
        if not self.coupled_axes(len(shape)):
            raise ValueError(
                f"{self} leaves no axis inside the groups of a leaf of shape {tuple(shape)}: each "
                "entry would be a group of its own; use L1 (or L0, MCP) for this leaf, or None"
            )

    def coupled_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes inside a group, to be reduced over."""
        return group_view(ndim, self.group_axis, self.batch_axis)


@dataclasses.dataclass(frozen=True)
class Grouped(OnGroups):
    """What penalties on the norms of groups share: the groups' weight, their norms, their support.

    The support has the shape of the leaf without the axes inside.

    Args:
      group_axis, batch_axis: as in `OnGroups`.
      weight: factor of every group of the leaf, above 0; default the square root of the number of
        entries in a group, so that groups of different sizes are treated alike.
    """

    _: dataclasses.KW_ONLY
    weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None:
            check_positive("weight", self.weight)

    def group_weight(self, shape: tuple[int, ...]) -> float:
        """The factor of every group of a leaf of this shape."""
        if self.weight is not None:
            return self.weight
        return math.sqrt(math.prod(shape[axis] for axis in self.coupled_axes(len(shape))))

    def norms(self, w: ArrayLike) -> jax.Array:
        """Euclidean norm of each group, shaped like the support; of gradient 0 in dead groups."""
        w = at_least_float32(w)
        axes = self.coupled_axes(w.ndim)
        # Divided by the largest entry first: squares of a tiny or huge group leave float32.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(w), axis=axes, keepdims=True, initial=0.0))
        dead = largest == 0.0
        scaled = jnp.sum(jnp.square(w / jnp.where(dead, 1.0, largest)), axis=axes, keepdims=True)
        norms = jnp.where(dead, 0.0, largest * jnp.sqrt(jnp.where(dead, 1.0, scaled)))
        return jnp.squeeze(norms, axes)

    def support(self, w: ArrayLike) -> jax.Array:
        w = jnp.asarray(w)
        return jnp.any(w != 0.0, axis=self.coupled_axes(w.ndim))
