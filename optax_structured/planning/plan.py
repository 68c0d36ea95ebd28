"""The memory of a model under AdamW and under a recipe, in total and on each device."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_structured as oxs
from optax_structured.memory import METHODS, MemoryReport, abstract_state, memory_report
from optax_structured.sharding import state_shardings

RECIPES = (
    "adamw",
    "galore",
    "fira",
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "trion",
    "ldadam",
    "grad_norm_lorp",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of one model under AdamW and under a recipe."""

    name: str  # of the model
    recipe: str
    before: MemoryReport  # adamw
    after: MemoryReport
    mesh: Mapping[str, int]  # empty: one device
    per_device: Mapping[str, int]  # bytes of the fullest device: weights, before, after


def make_plan(name: str, params: Any, recipe: str, structure: Any, mesh: Mapping[str, int]) -> Plan:
    """Weights, gradients and optimizer state of a model, in total and on each device.

    Args:
      name: what to call the model.
      params: abstract parameters.
      recipe: one of `RECIPES`.
      structure: the `LowRank`, or `rules` of them.
      mesh: sizes by name of mesh axis; empty for one device.

    Raises:
      ValueError: an unknown recipe; a spec on a leaf that cannot take it.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    adamw = optax.adamw(1e-3)
    tx = adamw if recipe == "adamw" else getattr(oxs, recipe)(1e-3, structure)
    structure = None if recipe == "adamw" else structure
    method = recipe if recipe in METHODS else None
    placed = place(params, mesh)
    per_device = {
        "weights": _local_bytes(placed, jax.tree.map(lambda leaf: leaf.sharding, placed)),
        "before": _state_on_device(adamw, placed),
        "after": _state_on_device(tx, placed),
    }
    before = memory_report(adamw, params)
    after = memory_report(tx, params, structure, method=method)
    return Plan(name, recipe, before, after, mesh, per_device)


def place(params: Any, mesh: Mapping[str, int]) -> Any:
    """The parameters spread over a mesh, each leaf along as many mesh axes as divide it.

    A mesh axis takes the longest of the last two axes that it divides, or else of the axes before
    them: fully sharded data parallelism, and two-dimensional sharding with two mesh axes.
    """
    abstract = AbstractMesh(tuple(mesh.values()) or (1,), tuple(mesh) or ("devices",))

    def sharded(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        local = list(leaf.shape)
        spec: list[tuple[str, ...]] = [()] * leaf.ndim
        for axis, size in abstract.shape.items():
            fitting = [i for i, n in enumerate(local) if n % size == 0]
            if fitting:
                best = max(fitting, key=lambda i: (i >= leaf.ndim - 2, local[i]))
                local[best] //= size
                spec[best] = (*spec[best], axis)
        sharding = NamedSharding(abstract, P(*(names or None for names in spec)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(sharded, params)


def _state_on_device(tx: Any, placed: Any) -> int:
    return _local_bytes(abstract_state(tx, placed), state_shardings(tx, placed))


def _local_bytes(tree: Any, shardings: Any) -> int:
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )
