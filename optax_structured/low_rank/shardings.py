"""Where the state of a projected leaf lives: with the leaf, and spread over all of its devices."""

from typing import Any

import jax
from jax.sharding import AxisType

from optax_structured.low_rank.stored_basis import decoded
from optax_structured.low_rank.transports import stores_matrix
from optax_structured.meshes import placement
from optax_structured.meshes.placement import Spec
from optax_structured.projectors.frames import Frame


class Places:
    """Shardings of what belongs to one leaf, where the sharding of the leaf is known.

    A basis lacks the axis that stays, and a low-rank leaf the one that is compressed; where that
    axis is sharded, the state is sharded over the same devices along another of its axes, so that
    no device holds more than its share. `..._where_used` undo that, for the products.
    """

    def __init__(self, frame: Frame, leaf: Any) -> None:
        self._frame = frame
        self.leaf = placement.home(leaf)
        if self.leaf is not None:
            self._mesh, spec = self.leaf
            batch, rows, cols = frame.axes.split(frame.shape)
            self._batch = tuple(spec[axis] for axis in batch)
            # Of several axes that become one, only the first can stay sharded.
            sides = [spec[axes[0]] for axes in (rows, cols)]
            self._size, self._length = sides if frame.side == "rows" else reversed(sides)

    def in_turn(self, spec: Any) -> bool:
        """Whether the matrices of a stack are fitted and multiplied one after the other.

        Where each is spread over the devices and the stack is not, as types tell on explicit meshes
        and `choose_sides` has said for others: a device then holds one whole basis at a time.
        """
        if not self._frame.batch or not stores_matrix(spec.projector):
            return False
        return spec.one_by_one or self._spread_within

    @property
    def _spread_within(self) -> bool:
        if self.leaf is None or AxisType.Explicit not in self._mesh.axis_types:
            return False
        return not any(self._batch) and any((*self._size, *self._length))

    def basis(self, x: jax.Array) -> jax.Array:
        """One array of a basis, or one number per matrix, placed if there is a place."""
        if self.leaf is None:
            return x
        # Whole rows, if there are enough: they are gathered as they are in memory.
        spec = self._spread(x.shape, self._natural(x.shape, "size"), x.ndim - 2)
        return placement.put(x, self._mesh, spec)

    def codes(self, x: jax.Array) -> jax.Array:
        """An array of a basis in codes, which travel as such and are whole where they are read."""
        if self.leaf is None:
            return x
        spec = (*self._batch, *[()] * (x.ndim - len(self._batch)))
        return placement.put(x, self._mesh, self._spread(x.shape, spec))

    def low(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Zeros for a low-rank leaf, placed if there is a place."""
        if self.leaf is None:
            return placement.zeros(shape, dtype)
        spec = self._spread(shape, self._natural(shape, "length"))
        return placement.zeros(shape, dtype, self._mesh, spec)

    def low_where_stored(self, x: jax.Array) -> jax.Array:
        """A low-rank leaf where its state lives, on an explicit mesh."""
        if not placement.on_explicit_mesh(x):
            return x
        return placement.move(x, self._spread(x.shape, self._natural(x.shape, "length")))

    def low_where_used(self, x: jax.Array) -> jax.Array:
        """A low-rank leaf where a product with the leaf needs it, on an explicit mesh."""
        if not placement.on_explicit_mesh(x):
            return x
        return placement.move(x, self._natural(x.shape, "length"))

    def factors(self, spec: Any, stored: Any) -> Any:
        """What the products of a leaf read, of a basis as it is stored."""
        basis = jax.tree.map(self._basis_where_used, decoded(spec, self._frame, stored))
        return spec.projector.factors(self._frame, basis)

    def _basis_where_used(self, x: jax.Array) -> jax.Array:
        """An array of a basis where a product with the leaf needs it, on an explicit mesh."""
        if not placement.on_explicit_mesh(x):
            return x
        return placement.move(x, self._natural(x.shape, "size"))

    def _natural(self, shape: tuple[int, ...], last: str) -> Spec:
        """As the leaf: its batch axes, and the last axis where it is one of the leaf."""
        if self.leaf is None:
            return ()
        rest = len(shape) - len(self._batch)
        if rest == 2 and shape[-1] == getattr(self._frame, last):
            return (*self._batch, (), self._size if last == "size" else self._length)
        return (*self._batch, *[()] * rest)

    def _spread(self, shape: tuple[int, ...], spec: Spec, first: int | None = None) -> Spec:
        if len(shape) < len(self._batch) + 2:
            return spec  # indices and counters
        missing = [a for a in (*self._size, *self._length) if a not in sum(spec, ())]
        return placement.spread(shape, spec, missing, self._mesh, first)
