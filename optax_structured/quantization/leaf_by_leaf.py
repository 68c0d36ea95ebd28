"""A step of an optimizer on a stored state, of which one leaf is decoded at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.quantization.stored_state import StoredArray, StoredState
from optax_structured.transforms.nonfinite import new_if
from optax_structured.xla.output_by_output import OutputByOutput
from optax_structured.xla.sequencing import as_one, zero_after
from optax_structured.xla.stacks import Rows, Stacks

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
    arrays = [plan.array(i) for i in range(len(stored))]
    abstract = [jax.eval_shape(a.decode, x) for a, x in zip(arrays, stored, strict=True)]
    program = OutputByOutput(step, gradients, abstract)
    decoded: dict[int, jax.Array] = {}

    def read(i: int) -> jax.Array:
        return decoded[i] if i in decoded else arrays[i].decode(stored[i])

    count = len(gradients)
    program.reads(
        [functools.partial(gradients.__getitem__, k) for k in range(count)]
        + [functools.partial(read, i) for i in range(len(stored))]
    )
    outputs: list[Any]
    structure: Any
    outputs, structure = jax.tree.flatten(program.shapes)
    made: list[Any] = [None] * len(outputs)
    turn = jnp.zeros((), jnp.uint8)  # stays 0
    select = functools.partial(new_if, usable)
    rows = Rows()

    def keep(places: Sequence[int]) -> None:
        for i, x in zip(places, program.run([count + i for i in places]), strict=True):
            made[count + i] = jax.tree.map(select, arrays[i].encode(x), stored[i])

    for turns in together([jnp.size(x) for x in gradients]):
        mine = [i for i, owner in enumerate(plan.owners) if owner in turns]
        coded = [i for i in mine if plan.codecs[i]]
        old = [stored[i] for i in coded]
        stacks = Stacks([arrays[i] for i in coded], old)
        waiting = list(old)
        for first, *_ in stacks.groups:  # so that none is decoded before its turn
            waiting[first] = old[first]._replace(codes=old[first].codes + turn)
        stacked = stacks.stack(waiting)
        found = stacks.unstack(stacks.map(StoredArray.decode, stacked), rows)
        decoded |= zip(coded, found, strict=True)
        # A leaf alone is kept as it is: to wait would take an array.
        old = [x if more else old[i] for (i, *more), x in zip(stacks.groups, stacked, strict=True)]
        found = program.run([*turns, *(count + i for i in coded)])
        made[turns.start : turns.stop] = found[: len(turns)]
        encode = functools.partial(stacks.map, StoredArray.encode)
        new = as_one(encode, stacks.stack(found[len(turns) :]), old, _true(usable, old))
        for i, x in zip(coded, stacks.unstack_apart(new, rows), strict=True):
            made[count + i] = x
        keep([i for i in mine if not plan.codecs[i]])
        if new:
            turn = zero_after(new[-1].codes, turn)
    keep([i for i, owner in enumerate(plan.owners) if owner is None])
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
    scales = [x.absmax for x in old if x.absmax.size]
    return ~(scales[0][(0,) * scales[0].ndim] < 0) if scales else jnp.ones((), bool)
