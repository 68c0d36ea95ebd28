"""Blocks: short runs of entries that share one scale."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optax_structured.meshes.placement import Spec, move, on_explicit_mesh, spec_of, spread


class Layout(NamedTuple):
    """How an array is cut: its leading axes stay, the others are one row of consecutive blocks."""

    lead: tuple[int, ...]  # the axes that stay
    size: int  # entries of a row
    block: int  # entries of a block; the last one of a row may be shorter

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.size // self.block)


def layout(shape: Sequence[int], block: int, batch: int = 0) -> Layout:
    """Blocks of consecutive entries in row-major order, of a shape and nothing else.

    As many leading axes stay as there are that no block crosses, and `batch` of them in any case;
    so a scale lies beside its entries on every mesh that shards those axes.
    """
    for kept in range(len(shape), batch, -1):
        size = math.prod(shape[kept:])
        if kept < len(shape) and size and size % block == 0:
            return Layout(tuple(shape[:kept]), size, block)
    size = math.prod(shape[batch:])
    return Layout(tuple(shape[:batch]), size, max(2, min(block, size + size % 2)))


def beside(x: jax.Array, block: int) -> jax.Array:
    """An array, moved on an explicit mesh so that no block lies on two devices.

    What is sharded inside blocks is sharded along the axes before them, over the same devices, as
    far as these divide: each device sends what it holds. What fits nowhere is repeated.
    """
    for spec in _route(x, x.shape, block):
        x = move(x, spec)
    return x


def back(x: jax.Array, leaf: Any, block: int) -> jax.Array:
    """What `beside` moved, where `leaf` is."""
    for spec in reversed(_route(leaf, x.shape, block)):
        x = move(x, spec)
    return x


def _route(leaf: Any, shape: Sequence[int], block: int) -> list[Spec]:
    """Where an array passes, one mesh axis at a time: XLA gathers it when two move at once."""
    if not on_explicit_mesh(leaf):
        return []
    cut, spec, mesh = layout(shape, block), spec_of(leaf), jax.typeof(leaf).sharding.mesh
    route, kept = [spec], len(cut.lead)
    while not _fits(spec, cut, mesh):
        lead, inner = spec[:kept], [list(axes) for axes in spec[kept:]]
        last = next(axes for axes in reversed(inner) if axes)
        lead = spread(cut.lead, lead, [last.pop()], mesh)
        spec = (*lead, *map(tuple, inner))
        route.append(spec)
    return route


def in_blocks(x: jax.Array, block: int, batch: int = 0) -> jax.Array:
    """(\\*lead, blocks, block) of an array; what is missing in the last block repeats its end.

    Raises:
      ValueError: on an explicit mesh, where a block would lie on two devices.
    """
    cut = layout(x.shape, block, batch)
    rows = _reshape(x, (*cut.lead, cut.size), _row_spec(x, cut))
    if missing := cut.blocks * cut.block - cut.size:
        rows = jnp.pad(rows, [(0, 0)] * len(cut.lead) + [(0, missing)], mode="edge")
    return _reshape(rows, (*cut.lead, cut.blocks, cut.block), (*_row_spec(x, cut), ()))


def out_of_blocks(blocks: jax.Array, shape: Sequence[int], batch: int = 0) -> jax.Array:
    """The array of its blocks."""
    cut = layout(shape, blocks.shape[-1], batch)
    spec = spec_of(blocks)[:-1]
    rows = _reshape(blocks, (*cut.lead, cut.blocks * cut.block), spec)[..., : cut.size]
    whole = [()] * (len(shape) - len(spec))
    return _reshape(rows, shape, (*spec, *whole)[: len(shape)])


def lookup(table: Any, index: jax.Array) -> jax.Array:
    """Entries of a small constant table, placed as the indices are."""
    out = jax.typeof(index).sharding if on_explicit_mesh(index) else None
    index = index.astype(jnp.uint32)  # a signed one is checked for negative places
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", out_sharding=out)


def _fits(spec: Spec, cut: Layout, mesh: Any) -> bool:
    """Whether each block of an array is on one device."""
    inner = spec[len(cut.lead) :]
    shards = math.prod(mesh.shape[name] for axes in inner for name in axes)
    return shards == 1 or not (any(inner[1:]) or cut.size % (shards * cut.block))


def _row_spec(x: jax.Array, cut: Layout) -> Spec:
    """The mesh axes of the rows of an array."""
    spec, kept = spec_of(x), len(cut.lead)
    inner = spec[kept:]
    mesh = jax.typeof(x).sharding.mesh
    if not _fits(spec, cut, mesh):
        shards = math.prod(mesh.shape[name] for axes in inner for name in axes)
        local = jax.typeof(x).sharding.shard_shape(x.shape)
        fits = math.gcd(cut.block, cut.size // shards)
        whole = cut.size % shards == 0 and fits > 1 and not any(inner[1:])
        raise ValueError(
            f"blocks of {cut.block} consecutive entries would lie across devices: an array of "
            f"shape {x.shape} is cut into pieces of {local}; shard an axis before the last, or "
            "choose a block that divides what one device holds of a row"
            + (f", such as {fits}" if whole else "")
        )
    return (*spec[:kept], sum(inner, ()))


def _reshape(x: jax.Array, shape: Sequence[int], spec: Spec) -> jax.Array:
    out = P(*(axis or None for axis in spec)) if on_explicit_mesh(x) else None
    return jax.lax.reshape(x, tuple(shape), out_sharding=out)
