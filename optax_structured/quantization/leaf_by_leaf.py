"""A step of an optimizer on a stored state, of which one leaf is decoded at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.quantization.codec import is_encoded
from optax_structured.quantization.stored_state import StoredState
from optax_structured.transforms.nonfinite import new_if
from optax_structured.xla.output_by_output import OutputByOutput
from optax_structured.xla.sequencing import as_one, zero_after

_TOGETHER = 2**16  # entries of leaves that are decoded at once, of which there are hundreds


def leaf_by_leaf(
    step: Callable[[Any, Any], Any],
    gradients: list[Any],
    stored: list[Any],
    plan: StoredState,
    usable: jax.Array | None,
) -> tuple[Any, Any]:
    """One step of the inner transformation, on one parameter after the other, if it is usable.

    Small ones take their turn together: what waits for each of hundreds takes long to compile.
    """
    decode = [functools.partial(plan.decode, i) for i in range(len(stored))]
    abstract = [jax.eval_shape(f, x) for f, x in zip(decode, stored, strict=True)]
    program = OutputByOutput(step, gradients, abstract)
    turn = jnp.zeros((), jnp.uint8)  # stays 0

    def decoded(i: int) -> jax.Array:
        x = stored[i]
        if is_encoded(x):  # so that it is not decoded before its turn
            x = x._replace(codes=x.codes + turn)
        return plan.decode(i, x)

    count = len(gradients)
    program.reads(
        [functools.partial(gradients.__getitem__, k) for k in range(count)]
        + [functools.partial(decoded, i) for i in range(len(stored))]
    )
    outputs: list[Any]
    structure: Any
    outputs, structure = jax.tree.flatten(program.shapes)
    made: list[Any] = [None] * len(outputs)
    for turns in together([jnp.size(x) for x in gradients]):
        mine = [i for i, owner in enumerate(plan.owners) if owner in turns]
        found = program.run([*turns, *(count + i for i in mine)])
        made[turns.start : turns.stop] = (new_if(usable, x) for x in found[: len(turns)])
        old = [stored[i] for i in mine]
        encode = functools.partial(plan.encode, mine)
        fresh = as_one(encode, found[len(turns) :], old, _true(usable, old))
        for i, x in zip(mine, fresh, strict=True):
            made[count + i] = x
        if codes := [x.codes for x in fresh if is_encoded(x)]:
            turn = zero_after(codes[-1], turn)
    rest = [count + i for i, owner in enumerate(plan.owners) if owner is None]
    shared = plan.encode([i - count for i in rest], program.run(rest))
    for i, x in zip(rest, shared, strict=True):
        made[i] = jax.tree.map(functools.partial(new_if, usable), x, stored[i - count])
    program.finish()
    return structure.unflatten(made)


def together(sizes: Sequence[int]) -> list[range]:
    """Runs of leaves of these sizes, each alone but for small ones.

    >>> together([2**16, 100, 100, 2**20])
    [range(0, 1), range(1, 3), range(3, 4)]
    """
    runs: list[range] = []
    total = _TOGETHER
    for i, size in enumerate(sizes):
        total += size
        if total > _TOGETHER:
            runs.append(range(i, i))
            total = size
        runs[-1] = range(runs[-1].start, i + 1)
    return runs


def _true(usable: jax.Array | None, old: list[Any]) -> jax.Array:
    """Whether a step is usable; where nothing says so, True in a form that XLA cannot fold."""
    if usable is not None:
        return usable
    scales = [x.absmax for x in old if is_encoded(x) and x.absmax.size]
    return ~(scales[0][(0,) * scales[0].ndim] < 0) if scales else jnp.ones((), bool)
