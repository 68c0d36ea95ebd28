"""Small leaves that are alike, computed as one stack."""

import functools
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.meshes.placement import on_explicit_mesh
from optax_structured.xla.alike import is_hashable
from optax_structured.xla.apart import SMALL, apart
from optax_structured.xla.sequencing import zero_after

_LEAVES = 128  # of one stack


class Rows:
    """Reads rows of stacks, at numbers that XLA for CPUs does not know.

    Backend: CPU, where XLA compiles kernels that are the same once, and each slice at a place that
    it knows is another one. So the numbers come out of a conditional that always goes one way,
    which XLA does not know; each number once for all stacks that share this object. Gain: `ramda`
    on 500 leaves of 64 x 64, solved in one loop, compiles in 4 s instead of 13. It can go when
    `tests/benchmarks/many_leaves.py` compiles as fast without.
    """

    def __init__(self) -> None:
        self._numbers: list[jax.Array] = []

    def first(self, count: int, stacked: Any) -> list[Any]:
        """So many rows of the leading axis of a tree of arrays, as trees."""
        numbers = self.numbers(count, stacked)
        return [jax.tree.map(functools.partial(_row, i=i), stacked) for i in numbers]

    def numbers(self, count: int, made: Any) -> list[jax.Array]:
        """0, 1, ..., unknown before a tree of arrays is made, if they are not there yet."""
        if count > len(self._numbers):
            more = [jnp.int32(i) for i in range(len(self._numbers), count)]
            never = zero_after(jax.tree.leaves(made)[0], jnp.zeros((), jnp.int32)) > 0
            self._numbers += jax.lax.cond(never, lambda: [jnp.int32(-1)] * len(more), lambda: more)
        return self._numbers[:count]


def _row(stack: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False, allow_negative_indices=False)


class Stacks:
    """Leaves of which those that are alike and small are computed as a stack.

    Backend: all, for compilation, on one device and under `jit`. Gain: 500 leaves of 64 x 64
    compile in 6 s instead of 12 with `galore`, in 8 instead of 24 with `apollo`, and their steps
    take the same time. It can go when `tests/benchmarks/many_leaves.py` compiles as fast without.

    Args:
      kinds: static, of each leaf: equal for leaves that are alike.
      trees: of each leaf its arrays.
      apart: numbers of leaves that are computed alone.
    """

    def __init__(
        self, kinds: Sequence[Any], trees: Sequence[Any], apart: Collection[int] = ()
    ) -> None:
        self.kinds = kinds
        self.groups: list[list[int]] = []
        growing: dict[Hashable, list[int]] = {}
        for i, (kind, tree) in enumerate(zip(kinds, trees, strict=True)):
            leaves, structure = jax.tree.flatten(tree)
            if i in apart or not is_hashable(kind) or not _may_share(leaves):
                self.groups.append([i])
                continue
            key = (kind, structure, *map(jax.typeof, leaves))
            group = growing.get(key)
            if group is None or len(group) == _LEAVES:
                group = growing[key] = []
                self.groups.append(group)
            group.append(i)

    def stack(self, trees: Sequence[Any]) -> list[Any]:
        """By group: the tree of a leaf alone, or those of all leaves, stacked."""
        return [
            trees[group[0]] if len(group) == 1 else jax.tree.map(_stack, *(trees[i] for i in group))
            for group in self.groups
        ]

    def map(self, function: Callable[..., Any], *stacked: Sequence[Any]) -> list[Any]:
        """By group: `function(kind, *trees)` of each leaf."""
        results = []
        for group, trees in zip(self.groups, zip(*stacked, strict=True), strict=True):
            of_kind = functools.partial(function, self.kinds[group[0]])
            results.append(of_kind(*trees) if len(group) == 1 else jax.vmap(of_kind)(*trees))
        return results

    def unstack(self, stacked: Sequence[Any], rows: Rows) -> list[Any]:
        """By leaf."""
        results: dict[int, Any] = {}
        for group, tree in zip(self.groups, stacked, strict=True):
            if len(group) == 1 or not jax.tree.leaves(tree):
                results |= dict.fromkeys(group, tree)
            else:
                results |= zip(group, rows.first(len(group), tree), strict=True)
        return [results[i] for i in range(len(self.kinds))]

    def unstack_apart(self, stacked: Sequence[Any], rows: Rows) -> list[Any]:
        """`unstack` in a program of its own, of what is returned and hardly read."""
        count = max(map(len, self.groups), default=1)
        if count == 1 or not jax.tree.leaves(stacked):
            return self.unstack(stacked, rows)
        rows.numbers(count, stacked)  # known outside of it
        return apart(functools.partial(self.unstack, rows=rows), stacked)


def _stack(*x: Any) -> Any:
    if isinstance(x[0], np.generic):
        return np.stack(x)
    if not jnp.ndim(x[0]):
        return jnp.stack(x)
    # One operation for all leaves, where `jnp.stack` takes another for each.
    return jax.lax.concatenate(x, 0).reshape(len(x), *jnp.shape(x[0]))


def _may_share(leaves: Sequence[Any]) -> bool:
    """Whether a stack is compiled once, is small, and moves no leaf to where the others live."""
    small = max((math.prod(jnp.shape(x)) for x in leaves), default=0) <= SMALL
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    return small and traced and jax.device_count() == 1 and not on_explicit_mesh(*leaves)
