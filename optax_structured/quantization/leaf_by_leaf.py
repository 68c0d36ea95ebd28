"""A step of an optimizer on a stored state, of which one leaf is decoded at a time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.quantization.blocks import in_blocks, out_of_blocks
from optax_structured.quantization.codec import DynamicCode, is_encoded, is_mapped
from optax_structured.quantization.dynamic import Dynamic
from optax_structured.quantization.in_turn import InTurn
from optax_structured.quantization.settled import settled
from optax_structured.trees.precision import wide_dtype
from optax_structured.turns import zero_after


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of each array of the inner state."""

    paths: Sequence[str]  # of the parameters
    owners: Sequence[int | None]  # the position of the parameter that each array belongs to
    leaves: Sequence[Any]  # the arrays, abstract and decoded
    codecs: Sequence[Dynamic | None]

    def stored(self, state: Any) -> tuple[list[Any], Any]:
        """What there is of each array in a state, and the structure of a decoded one."""
        structure: Any
        nodes, structure = jax.tree.flatten(state, lambda x: is_encoded(x) or is_mapped(x))
        nodes = [DynamicCode(**x) if is_mapped(x) else x for x in nodes]
        found: list[Any] = []
        for i, node in enumerate(nodes):
            if not is_encoded(node) or self.codecs[len(found)] is not None:
                found.append(node)
                nodes[i] = 0.0
            else:  # codes of the inner transformation: three arrays like any others
                found += node
        return found, jax.tree.structure(structure.unflatten(nodes))

    def encode(self, places: Sequence[int], arrays: Sequence[Any], in_blocks: bool = False) -> Any:
        """Arrays of the state, stored."""
        return [self._encode(i, x, in_blocks) for i, x in zip(places, arrays, strict=True)]

    def _encode(self, i: int, x: Any, in_blocks: bool) -> Any:
        codec = self.codecs[i]
        if codec is None:
            return x
        try:
            return codec.encode_blocks(x, self.leaves[i].shape) if in_blocks else codec.encode(x)
        except ValueError as error:
            owner = self.owners[i]
            assert owner is not None  # it has a codec
            error.add_note(f"quantized: in the state of {self.paths[owner]!r}")
            raise

    def decode(self, i: int, x: Any, in_blocks: bool = False) -> jax.Array:
        codec, leaf = self.codecs[i], self.leaves[i]
        if codec is None:
            return x
        decode = codec.decode_blocks if in_blocks else codec.decode
        return decode(x, leaf.shape).astype(wide_dtype(leaf))

    def block(self, due: Sequence[int], shape: tuple[int, ...]) -> int | None:
        """The size of the whole blocks in which a parameter and all of its state can be seen."""
        codecs = [self.codecs[i] for i in due]
        sizes = {codec.block for codec in codecs if codec is not None}
        if len(sizes) != 1 or None in codecs or {self.leaves[i].shape for i in due} != {shape}:
            return None
        (size,) = sizes
        return size if math.prod(shape) % size == 0 else None


def leaf_by_leaf(
    step: Callable[[Any, Any], Any], gradients: list[Any], stored: list[Any], plan: Plan
) -> tuple[Any, Any]:
    """One step of the inner transformation, on one parameter after the other."""
    decode = [functools.partial(plan.decode, i) for i in range(len(stored))]
    abstract = [jax.eval_shape(f, x) for f, x in zip(decode, stored, strict=True)]
    program = InTurn(step, gradients, abstract)
    turn = jnp.zeros((), jnp.uint8)  # stays 0
    block: int | None = None
    values: list[Any] = []  # of a leaf: its update and its state
    read: set[int] = set()

    def gradient(k: int, blocked: bool) -> jax.Array:
        return blocks(gradients[k]) if blocked else gradients[k]

    def blocks(x: jax.Array) -> jax.Array:
        assert block is not None
        return in_blocks(x, block)

    def decoded(i: int, blocked: bool) -> jax.Array:
        nonlocal turn
        if i in read:  # Lion reads its moment twice; to decode it anew is cheaper than to keep it
            turn = zero_after(values[0], turn)
        read.add(i)
        x = stored[i]
        if is_encoded(x):  # so that it is not decoded before its turn
            x = x._replace(codes=x.codes + turn)
        return plan.decode(i, x, blocked)

    count = len(gradients)
    program.reads(
        [functools.partial(gradient, k) for k in range(count)]
        + [functools.partial(decoded, i) for i in range(len(stored))]
    )
    outputs: list[Any]
    structure: Any
    outputs, structure = jax.tree.flatten(program.shapes)
    made: list[Any] = [None] * len(outputs)
    for k in range(count):
        mine = [i for i, owner in enumerate(plan.owners) if owner == k]
        due, shape = [k, *(count + i for i in mine)], outputs[k].shape
        block = plan.block(mine, shape)
        if block and program.is_entrywise(due, shape):
            run = program.run_in_blocks(due, shape, blocks)
            values = [next(run)]
            values += run
        else:
            block, values = None, program.run(due)
        made[k] = values[0] if block is None else out_of_blocks(values[0], shape)
        encode = functools.partial(plan.encode, mine, in_blocks=block is not None)
        coded = settled(encode, values[1:], [stored[i] for i in mine])
        for i, x in zip(mine, coded, strict=True):
            made[count + i] = x
            if is_encoded(x):
                turn = zero_after(x.codes, turn)
    rest = [count + i for i, owner in enumerate(plan.owners) if owner is None]
    shared = plan.encode([i - count for i in rest], program.run(rest))
    for i, x in zip(rest, shared, strict=True):
        made[i] = x
    return structure.unflatten(made)
