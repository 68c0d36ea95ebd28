"""Groups that span leaves: one norm over the slices that belong to a unit, wherever they lie."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Norm, Regularizer
from optax_structured.regularizers.group import GroupLasso
from optax_structured.trees.axes import normalize_axes
from optax_structured.trees.checks import check_positive


@dataclasses.dataclass(frozen=True)
class CoupledGroupLasso(Norm):
    r"""`GroupLasso` whose groups span leaves: each is what one unit has in all leaves of a name.

    .. math:: \psi(w) = \sum_{u=1}^{n} \omega \Big(\sum_{l} \|w_{l,u}\|_2^2\Big)^{1/2}

    Give it, under one name, to every leaf in which the units have slices: those of a unit become
    zero together. `prox_step`, and so every proximal recipe, puts the slices of all leaves side by
    side, one row a unit, and takes the exact prox of `GroupLasso` in their metric.
    `compact.couplings` finds the names, axes and numbers for a model.

    Args:
      units: the name. Leaves with the same name, count and weight share their norms.
      axis: of this leaf, on which its units lie.
      count: n, the number of units.
      inner: entries of the axis beside each other that belong to one unit, such as the size of a
        head; index i of the axis is of unit `(i // inner) % count`.
      weight: :math:`\omega`, above 0; default the square root of the number of entries of a unit in
        all leaves.

    Raises:
      ValueError: a count or inner below 1, a weight that is not above 0; from `check`, a leaf
        without this axis or whose axis does not hold the units.

    Equals `GroupLasso(axis)` for a name that one leaf has. The methods see one leaf alone, as if it
    were the only one of its name; `joined` puts leaves together.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> unit = lambda axis: oxs.CoupledGroupLasso("hidden", axis, count=2, weight=1.0)
      >>> structure = oxs.rules(("up", unit(1)), ("bias", unit(0)), ("down", unit(0)))
      >>> optimizer = optax.chain(optax.sgd(1.0), oxs.prox_step(structure, 5.0, weight=1.0))
      >>> params = {"up": jnp.array([[2.0, 6.0]]), "bias": jnp.array([1.0, 0.0]),
      ...           "down": jnp.array([[2.0], [8.0]])}
      >>> zero = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = optimizer.update(zero, optimizer.init(params), params)
      >>> for name, leaf in sorted(optax.apply_updates(params, updates).items()):
      ...     print(name, leaf.ravel().round(4))  # the norms are 3 and 10
      bias [0. 0.]
      down [0. 4.]
      up [0. 3.]
    """

    units: str
    axis: int
    count: int
    inner: int = 1
    weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("count", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.weight is not None:
            check_positive("weight", self.weight)

    @property
    def joint(self) -> GroupLasso:
        """The penalty on the matrix of all slices, one row a unit; one object a weight."""
        return _on_rows(self.weight)

    def check(self, shape: tuple[int, ...]) -> None:
        (axis,) = normalize_axes(self.axis, len(shape), "axis")
        if shape[axis] % (self.count * self.inner):
            raise ValueError(
                f"axis {self.axis} of a leaf of shape {tuple(shape)} has length {shape[axis]}, "
                f"which {self.count} units of {self.inner} entries do not divide"
            )

    def rows(self, w: ArrayLike) -> jax.Array:
        """The slices of a leaf, `(count, entries of a unit)`."""
        w = jnp.asarray(w)
        axis = self.axis % w.ndim
        parts = w.reshape(*w.shape[:axis], -1, self.count, self.inner, *w.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis + 1, 0).reshape(self.count, -1)

    def leaf(self, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The leaf of this shape with these slices: the inverse of `rows`."""
        axis = self.axis % len(shape)
        outer = shape[axis] // (self.count * self.inner)
        parts = rows.reshape(self.count, *shape[:axis], outer, self.inner, *shape[axis + 1 :])
        return jnp.moveaxis(parts, 0, axis + 1).reshape(shape)

    def value(self, w: ArrayLike) -> jax.Array:
        return self.joint.value(self.rows(w))

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        rows = self.rows(metric) if jnp.ndim(metric) else metric
        return self.leaf(self.joint.prox(self.rows(u), rows, strength), jnp.shape(u))

    def support(self, w: ArrayLike) -> jax.Array:
        return self.joint.support(self.rows(w))

    def dual_norm(self, y: ArrayLike) -> jax.Array:
        return self.joint.dual_norm(self.rows(y))

    def coupled_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))


@functools.cache
def _on_rows(weight: float | None) -> GroupLasso:
    return GroupLasso(0, weight=weight)


class Joint(NamedTuple):
    """Leaves that share norms, as one matrix; or one leaf alone."""

    regularizer: Regularizer
    places: tuple[int, ...]  # of the leaves
    parts: tuple[CoupledGroupLasso, ...]  # of each leaf; () for one leaf alone
    shapes: tuple[tuple[int, ...], ...]

    def matrix(self, leaves: Mapping[int, jax.Array] | Sequence[jax.Array]) -> jax.Array:
        """The slices of all leaves side by side, given those at `places`."""
        if not self.parts:
            return leaves[self.places[0]]
        rows = [part.rows(leaves[i]) for part, i in zip(self.parts, self.places, strict=True)]
        return jnp.concatenate(rows, axis=1)

    def leaves(self, matrix: jax.Array) -> Iterator[tuple[int, jax.Array]]:
        """Each leaf of a matrix, after its place."""
        if not self.parts:
            yield self.places[0], matrix
        start = 0
        for part, i, shape in zip(self.parts, self.places, self.shapes, strict=False):
            size = math.prod(shape) // part.count
            yield i, part.leaf(matrix[:, start : start + size], shape)
            start += size


def joined(specs: Sequence[Regularizer | None], shapes: Sequence[tuple[int, ...]]) -> list[Joint]:
    """What a penalty acts on as a whole: leaves, and those of a name together.

    Args:
      specs: the regularizer of each leaf; leaves without one are left out.
      shapes: of the leaves.
    """
    names: dict[Hashable, list[int]] = {}
    for i, spec in enumerate(specs):
        if isinstance(spec, CoupledGroupLasso):
            names.setdefault((spec.units, spec.count, spec.weight), []).append(i)
        elif spec is not None:
            names[i] = [i]
    found = []
    for places in names.values():
        first = specs[places[0]]
        assert first is not None
        parts = tuple(x for i in places if isinstance(x := specs[i], CoupledGroupLasso))
        regularizer = parts[0].joint if parts else first
        inside = tuple(shapes[i] for i in places)
        found.append(Joint(regularizer, tuple(places), parts, inside))
    return found
