"""Where the state of a projected leaf lives: with the leaf, and spread over all of its devices."""

from typing import Any

import jax

from optax_structured.low_rank.frames import Frame
from optax_structured.trees import placement
from optax_structured.trees.placement import Spec


class Places:
    """Shardings of what belongs to one leaf, where the sharding of the leaf is known.

    A basis lacks the axis that stays, and a low-rank leaf the one that is compressed; where that
    axis is sharded, the state is sharded over the same devices along another of its axes, so that
    no device holds more than its share. `at_hand` undoes that, for the products.
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

    def state(self, struct: Any) -> Any:
        """Zeros of a shape and dtype, a basis or a low-rank leaf, placed if there is a place."""
        if self.leaf is None:
            return placement.zeros(struct.shape, struct.dtype)
        spec = self._home(struct.shape)
        return placement.zeros(struct.shape, struct.dtype, self._mesh, spec)

    def at_home(self, x: jax.Array) -> jax.Array:
        """`x` where its state lives, on an explicit mesh."""
        return placement.move(x, self._home(x.shape)) if placement.on_explicit_mesh(x) else x

    def at_hand(self, x: jax.Array) -> jax.Array:
        """`x` where a product with the leaf needs it, on an explicit mesh."""
        return placement.move(x, self._natural(x.shape)) if placement.on_explicit_mesh(x) else x

    def _natural(self, shape: tuple[int, ...]) -> Spec:
        """As the leaf: its batch axes, and its matrix axes where `x` has them."""
        lead = len(self._batch)
        if len(shape) != lead + 2:
            return (*self._batch, *[()] * (len(shape) - lead))[: len(shape)]
        first = self._size if shape[-2] == self._frame.size != self._frame.rank else ()
        last = self._length if shape[-1] == self._frame.length != self._frame.rank else ()
        return (*self._batch, first, last)

    def _home(self, shape: tuple[int, ...]) -> Spec:
        spec = self._natural(shape)
        if len(shape) != len(self._batch) + 2:
            return spec
        missing = [a for a in (*self._size, *self._length) if a not in sum(spec, ())]
        return placement.spread(shape, spec, missing, self._mesh)
