"""Which codec each array of a state has, and going between the stored and the decoded state."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from optax_structured.quantization.blocks import back
from optax_structured.quantization.checks import of_leaf
from optax_structured.quantization.codec import DynamicCode, is_encoded, is_mapped
from optax_structured.quantization.dynamic import Dynamic
from optax_structured.states import changed_setting
from optax_structured.trees.precision import wide_dtype


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """How one array is stored; those of parameters that are alike are equal."""

    codec: Dynamic | None
    leaf: Any  # abstract and decoded
    name: str = dataclasses.field(compare=False)  # of the parameter, for errors

    def encode(self, x: jax.Array) -> Any:
        """What is stored of it."""
        if self.codec is None:  # computed in float32, kept as the inner transformation keeps it
            return x if x.dtype == self.leaf.dtype else x.astype(self.leaf.dtype)
        with of_leaf("quantized: the state of", self.name):
            return self.codec.encode(x)

    def decode(self, x: Any) -> jax.Array:
        """The array, from what is stored."""
        if self.codec is None:
            return x
        with of_leaf("quantized: the state of", self.name):
            decoded = self.codec.decode(x, self.leaf.shape).astype(wide_dtype(self.leaf))
            return back(decoded, self.leaf, self.codec.block)


@dataclasses.dataclass(frozen=True)
class StoredState:
    """What becomes of each array of the inner state."""

    paths: Sequence[str]  # of the parameters
    owners: Sequence[int | None]  # the position of the parameter that each array belongs to
    state: Any  # of the inner transformation, abstract and decoded
    codecs: Sequence[Dynamic | None]

    @functools.cached_property
    def leaves(self) -> list[Any]:
        """The arrays of the inner state, abstract."""
        return jax.tree.leaves(self.state)

    def stored(self, state: Any) -> tuple[list[Any], Any]:
        """What there is of each array in a state, and the structure of a decoded one.

        Raises:
          ValueError: the state was made with other codecs, or by another transformation.
        """
        structure: Any
        nodes, structure = jax.tree.flatten(state, lambda x: is_encoded(x) or is_mapped(x))
        nodes = [DynamicCode(**x) if is_mapped(x) else x for x in nodes]
        made = jax.tree.leaves(self.state, is_leaf=is_encoded)
        if len(nodes) != len(made):
            raise ValueError(
                f"quantized: the state has {len(nodes)} arrays where inner.init(params) makes "
                f"{len(made)}: it belongs to another transformation or to other parameters"
            )
        found: list[Any] = []
        for i, (node, there) in enumerate(zip(nodes, made, strict=True)):
            if is_encoded(there):  # by the inner transformation: arrays like any others
                found += node
            else:
                self._check(len(found), node)
                found.append(node)
                nodes[i] = 0.0
        return found, jax.tree.structure(structure.unflatten(nodes))

    def array(self, i: int) -> StoredArray:
        """How one array is stored."""
        return StoredArray(self.codecs[i], self.leaves[i], self.name(self.owners[i]))

    def name(self, owner: int | None) -> str:
        """The path of a parameter."""
        return "what all parameters share" if owner is None else self.paths[owner]

    def _check(self, i: int, node: Any) -> None:
        """Raises ValueError for an array that is stored as another codec would store it."""
        codec, leaf = self.codecs[i], self.leaves[i]
        expected = leaf if codec is None else codec.abstract(leaf.shape)
        in_codes = is_encoded(node) or codec is not None  # else the inner transformation looks
        if in_codes and _shapes(node) != _shapes(expected):
            old, new = (_described(x, leaf.shape) for x in (node, expected))
            raise changed_setting("quantized", self.name(self.owners[i]), old, new)


def _shapes(stored: Any) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(stored)]


def _described(stored: Any, shape: tuple[int, ...]) -> str:
    """How an array is stored that should have this shape."""
    if not is_encoded(stored):
        return f"{stored.dtype.name} of shape {stored.shape}"
    codes, scales = stored[:2]
    blocks = scales.shape[-1]
    if codes.shape != shape and codes.shape[:-1] == scales.shape:
        return f"4 bits in blocks of {2 * codes.shape[-1]}"
    entries = math.prod(codes.shape[scales.ndim - 1 :])
    size = f"blocks of {entries // blocks}" if entries % blocks == 0 else f"{blocks} blocks"
    return f"8 bits of shape {codes.shape} in {size}"
