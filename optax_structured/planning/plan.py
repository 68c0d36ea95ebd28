"""The memory of a model under AdamW and under a recipe, in total and on each device."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_structured.memory import MemoryReport, abstract_state, memory_report
from optax_structured.meshes.shardings import choose_sides, state_shardings
from optax_structured.planning import tpu
from optax_structured.planning.chips import Chip
from optax_structured.planning.tpu import CompiledStep
from optax_structured.quantization import Dynamic
from optax_structured.recipes import registry
from optax_structured.training.state_bits import codec_of, default_state_bits, made
from optax_structured.trees import resolve
from optax_structured.weights import quantize_weights

RECIPES = tuple(name for name, recipe in registry.RECIPES.items() if recipe.numbers)

# What is tried where a recipe does not fit, and the bits of its moments.
_THRIFTY = (("adamw", 8), ("galore", 32), ("galore", 8), ("apollo", 32), ("q_galore", 8))


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
    chip: Chip | None = None
    step: CompiledStep | None = None  # for that chip, where libtpu is here
    fitting: tuple[tuple[str, int], ...] = ()  # recipes that fit where this does not, with bytes

    @property
    def on_device(self) -> int:
        """Weights, gradients and state, and the temporaries of the step where they are known."""
        held = sum(self.per_device[part] for part in ("weights", "gradients", "after"))
        return held + (self.step.temporaries if self.step else 0)


def make_plan(
    name: str,
    params: Any,
    recipe: str,
    structure: Any,
    mesh: Mapping[str, int],
    state_bits: int | None = None,
    chip: Chip | None = None,
) -> Plan:
    """Weights, gradients and optimizer state of a model, in total and on each device.

    Args:
      name: what to call the model.
      params: abstract parameters.
      recipe: one of `RECIPES`.
      structure: the `LowRank`, or `rules` of them.
      mesh: sizes by name of mesh axis; empty for one device.
      state_bits: of an entry of a moment, 32, 8 or 4; None for what the recipe itself uses.
      chip: what the mesh consists of; with libtpu, the step is compiled for it.

    Raises:
      ValueError: an unknown recipe or number of bits; a spec on a leaf that cannot take it.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    bits = default_state_bits(recipe) if state_bits is None else state_bits
    given, placed = structure, place(params, mesh)
    structure = None if registry.RECIPES[recipe].family == "plain" else structure
    adamw = optax.adamw(1e-3)
    moments = codec_of(bits)
    tx = local_tx = _optimizer(recipe, structure, moments)
    if mesh and structure is not None:
        local_tx = _optimizer(recipe, choose_sides(structure, placed), moments)
    weights, local_weights = _weights(recipe, structure, placed)
    per_device = {
        "gradients": _local_bytes(placed, jax.tree.map(lambda leaf: leaf.sharding, placed)),
        "weights": local_weights,
        "before": _state_on_device(adamw, placed),
        "after": _state_on_device(local_tx, placed),
    }
    before = memory_report(adamw, params)
    after = memory_report(tx, params, structure, method=recipe)
    made = Plan(name, recipe, before, after, weights, moments, mesh, per_device, chip)
    if chip is None:
        return made
    if tpu.is_here():
        made = dataclasses.replace(made, step=tpu.compile_step(local_tx, placed, mesh, chip))
    if made.on_device > chip.memory:
        made = dataclasses.replace(made, fitting=_fitting(placed, given, chip))
    return made


def _fitting(placed: Any, structure: Any, chip: Chip) -> tuple[tuple[str, int], ...]:
    """The recipes of `_THRIFTY` whose weights, gradients and state a chip holds, with bytes."""
    gradients = _local_bytes(placed, jax.tree.map(lambda leaf: leaf.sharding, placed))
    found = []
    for recipe, bits in _THRIFTY:
        own = None if registry.RECIPES[recipe].family == "plain" else structure
        tx = _optimizer(recipe, own, codec_of(bits))
        size = gradients + _weights(recipe, own, placed)[1] + _state_on_device(tx, placed)
        if size <= chip.memory:
            found.append((f"--recipe {recipe} --state-bits {bits}", size))
    return tuple(found)


def largest_rank(
    params: Any,
    recipe: str,
    structure: Callable[[int], Any],
    mesh: Mapping[str, int],
    budget: int,
    state_bits: int | None = None,
) -> int:
    """The largest rank for which weights, gradients and state fit into a number of bytes.

    Ranks that do not pay are left out: those that no leaf can take, or with more state than AdamW.

    Args:
      params, mesh, state_bits: as in `make_plan`.
      recipe: one of `RECIPES` that has a rank to choose.
      structure: what a rank stands for.
      budget: bytes of the fullest device.

    Raises:
      ValueError: a recipe without a rank to choose, or not even rank 1 fits.
    """
    if registry.RECIPES[recipe].family == "plain" or recipe == "apollo_mini":
        raise ValueError(f"{recipe} has no rank to choose; leave --budget out")
    placed = place(params, mesh)
    codec = codec_of(default_state_bits(recipe) if state_bits is None else state_bits)
    gradients = _local_bytes(placed, jax.tree.map(lambda leaf: leaf.sharding, placed))
    others = gradients + _weights(recipe, structure(1), placed)[1]
    room = min(budget - others, _state_on_device(optax.adamw(1e-3), placed))

    def needed(rank: int) -> int:
        return _state_on_device(_optimizer(recipe, structure(rank), codec), placed)

    def useless(rank: int) -> bool:
        try:
            return not any(resolve(structure(rank), params))
        except ValueError:  # of a leaf that is named by a rule
            return True

    low, least = 1, needed(1)
    if least > room:
        raise ValueError(
            f"--budget {budget / 1e9:g}: rank 1 needs {(others + least) / 1e9:.4g} GB on the "
            "fullest device; give more devices with --mesh, fewer --state-bits, or a narrower "
            "--dtype"
        )
    sides = max(min(leaf.shape[-2:], default=1) for leaf in jax.tree.leaves(params))
    high = bisect.bisect_left(range(2, sides + 1), True, key=useless) + 1
    most = needed(high)
    # Bytes are nearly proportional to the rank: each guess lies on the line between two known.
    while most > room and high - low > 1:
        guess = low + (high - low) * (room - least) // (most - least)
        guess = min(max(guess, low + 1), high - 1)
        found = needed(guess)
        low, least, high, most = (
            (guess, found, high, most) if found <= room else (low, least, guess, found)
        )
    return high if most <= room else low


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


def _weights(recipe: str, structure: Any, placed: Any) -> tuple[int, int]:
    """Bytes of the weights, in total and on the fullest device; of Q-GaLore in INT8."""
    total = local = 0
    for leaf, spec in zip(jax.tree.leaves(placed), resolve(structure, placed), strict=True):
        size = leaf.size * leaf.dtype.itemsize
        if spec is not None and registry.RECIPES[recipe].takes("weights"):
            whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            size = jax.eval_shape(quantize_weights, whole).bytes
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
