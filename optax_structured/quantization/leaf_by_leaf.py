"""A step of an optimizer on a stored state, of which one leaf is decoded at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.quantization.blocks import in_blocks, out_of_blocks
from optax_structured.quantization.codec import is_encoded
from optax_structured.quantization.settled import settled
from optax_structured.quantization.stored_state import Plan
from optax_structured.xla.output_by_output import InTurn
from optax_structured.xla.sequencing import zero_after


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
        if not blocked:
            return gradients[k]
        with plan.named(k):
            return blocks(gradients[k])

    def blocks(x: jax.Array) -> jax.Array:
        assert block is not None
        return in_blocks(x, block)

    def decoded(i: int, blocked: bool) -> jax.Array:
        nonlocal turn
        if i in read:  # Lion reads its moment twice; decoding it again is cheaper than to keep it
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
    program.finish()
    return structure.unflatten(made)
