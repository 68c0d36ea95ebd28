"""The memory of a model under AdamW and under a recipe, in total and on each device."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_structured.memory import MemoryReport, abstract_state, memory_report
from optax_structured.meshes.shardings import state_shardings
from optax_structured.quantization import Affine, Dynamic
from optax_structured.recipes import registry
from optax_structured.training.state_bits import codec_of, default_state_bits, made
from optax_structured.trees import resolve

RECIPES = tuple(name for name, recipe in registry.RECIPES.items() if recipe.numbers)
_SMALLEST_BLOCK = 8  # that halving tries; its scales take as much as half of an 8-bit code


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of one model under AdamW and under a recipe."""

    name: str  # of the model
    recipe: str
    before: MemoryReport  # adamw
    after: MemoryReport
    weight_bytes: int  # after: those of q_galore are as `quantize_weights` holds them
    moments: Dynamic | None  # after; None: float32
    mesh: Mapping[str, int]  # empty: one device
    per_device: Mapping[str, int]  # bytes of the fullest device: gradients, weights, before, after


def make_plan(
    name: str,
    params: Any,
    recipe: str,
    structure: Any,
    mesh: Mapping[str, int],
    state_bits: int | None = None,
) -> Plan:
    """Weights, gradients and optimizer state of a model, in total and on each device.

    Args:
      name: what to call the model.
      params: abstract parameters.
      recipe: one of `RECIPES`.
      structure: the `LowRank`, or `rules` of them.
      mesh: sizes by name of mesh axis; empty for one device.
      state_bits: of an entry of a moment, 32, 8 or 4; None for what the recipe itself uses. On a
        mesh, blocks are halved until none would lie on two devices.

    Raises:
      ValueError: an unknown recipe or number of bits; a spec on a leaf that cannot take it.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    bits = default_state_bits(recipe) if state_bits is None else state_bits
    structure = None if recipe == "adamw" else structure
    placed = place(params, mesh)
    adamw = optax.adamw(1e-3)
    moments = _fitting(recipe, structure, codec_of(bits), placed)
    tx = _optimizer(recipe, structure, moments)
    weights, local_weights = _weights(recipe, structure, placed)
    per_device = {
        "gradients": _local_bytes(placed, jax.tree.map(lambda leaf: leaf.sharding, placed)),
        "weights": local_weights,
        "before": _state_on_device(adamw, placed),
        "after": _state_on_device(tx, placed),
    }
    before = memory_report(adamw, params)
    after = memory_report(tx, params, structure, method=recipe)
    return Plan(name, recipe, before, after, weights, moments, mesh, per_device)


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


def _optimizer(recipe: str, structure: Any, moments: Dynamic | None) -> Any:
    structured = () if structure is None else (structure,)
    given = {"weights": None} if registry.RECIPES[recipe].takes("weights") else {}
    return made(recipe, moments, 1e-3, *structured, **given)


def _fitting(recipe: str, structure: Any, codec: Dynamic | None, placed: Any) -> Dynamic | None:
    """The codec with the largest blocks of which none lies on two devices.

    Raises:
      ValueError: of the codec as it was given, if no size of block will do.
    """
    if codec is None:
        return None
    try:
        state_shardings(_optimizer(recipe, structure, codec), placed)
    except ValueError:
        if codec.block <= _SMALLEST_BLOCK:
            raise
        halved = dataclasses.replace(codec, block=codec.block // 2)
        with contextlib.suppress(ValueError):
            return _fitting(recipe, structure, halved, placed)
        raise
    return codec


def _weights(recipe: str, structure: Any, placed: Any) -> tuple[int, int]:
    """Bytes of the weights, in total and on the fullest device; of Q-GaLore in INT8."""
    total = local = 0
    for leaf, spec in zip(jax.tree.leaves(placed), resolve(structure, placed), strict=True):
        whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        in_codes = spec is not None and registry.RECIPES[recipe].takes("weights")
        held = jax.eval_shape(Affine().encode, whole) if in_codes else whole
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
        share = math.prod(leaf.sharding.shard_shape(leaf.shape)) / max(leaf.size, 1)
        total += size
        local += math.ceil(size * share)
    return total, local


def _state_on_device(tx: Any, placed: Any) -> int:
    return _local_bytes(abstract_state(tx, placed), state_shardings(tx, placed))


def _local_bytes(tree: Any, shardings: Any) -> int:
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )
