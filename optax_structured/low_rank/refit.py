"""Fitting the basis of a leaf anew, when it is due and its gradient can be used."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.branch import branch
from optax_structured.low_rank import inner_state
from optax_structured.low_rank.frames import matrix_where
from optax_structured.low_rank.leaves import Projected
from optax_structured.trees import placement
from optax_structured.trees.precision import at_least_float32


class RefreshState(NamedTuple):
    """When a leaf was and will be fitted."""

    fitted: jax.Array  # (*batch,) bool: False until a usable gradient came; then due at every step
    rule: Any  # memory of the refresh rule


def refreshed(
    p: Projected,
    stored: Any,
    memory: RefreshState,
    fields: inner_state.Fields,
    gradient: jax.Array,
    count: jax.Array,
    mask: Any,
) -> tuple[Any, RefreshState, inner_state.Fields]:
    """The basis of one leaf as it is stored, fitted if it is due, and what depends on it."""
    spec, frame = p.spec, p.frame
    projector, transport = spec.projector, spec.transport
    due = spec.refresh.due(memory.rule, count, spec.period, p.share) if mask is None else mask
    due = due | ~memory.fitted  # matrix by matrix: one that waits for its first fit moves no other

    def refit(
        usable: Any, stored: Any, memory: RefreshState, fields: Any, gradient: Any, count: Any
    ) -> Any:
        basis = p.decoded(stored)
        wide = at_least_float32(gradient)
        seed = seed_of(frame.name, count)
        fit = projector.refit(frame, basis, wide, memory.fitted, seed)
        # A matrix alone is usable if it is here; but to choose also keeps the order in which bases
        # are stored: without, XLA for CPUs transposes each of them twice at every step.
        fit = jax.tree.map(lambda new, old: matrix_where(usable, new, old), fit, basis)
        rule = spec.refresh.after(memory.rule, projector, frame, basis, fit, memory.fitted, usable)
        kept = transport.basis(projector, frame, basis, fit)
        again = usable & memory.fitted  # before the first fit there is nothing to turn to
        new = jax.tree.map(lambda k, f: matrix_where(again, k, f), kept, fit)
        if fields:
            rotation = functools.cache(lambda: projector.overlap(frame, basis, new))
            moved = {k: transport.moments(v, rotation, count) for k, v in fields.items()}
            fields = jax.tree.map(
                lambda m, v: placement.like(matrix_where(again, m, v), v), moved, fields
            )
        # A matrix that is not fitted keeps its codes: decoded and encoded again, they might differ.
        stored = jax.tree.map(
            lambda n, s: placement.like(matrix_where(usable, n, s), s), p.encoded(new), stored
        )
        return stored, RefreshState(memory.fitted | usable, rule), fields

    def keep(
        usable: Any, stored: Any, memory: RefreshState, fields: Any, gradient: Any, count: Any
    ) -> Any:
        del usable, gradient, count
        return stored, memory, fields

    def look(gradient: jax.Array, fitted: jax.Array) -> jax.Array:
        size = jnp.sum(jnp.abs(at_least_float32(gradient)), (-2, -1))
        return jnp.isfinite(size) & (size > 0)

    def look_away(gradient: jax.Array, fitted: jax.Array) -> jax.Array:
        return jnp.zeros_like(fitted)

    usable = due & branch(jnp.any(due), look, look_away, gradient, memory.fitted)
    operands = (usable, stored, memory, fields, gradient, count)
    return branch(jnp.any(usable), refit, keep, *operands)


def seed_of(name: str, count: jax.Array) -> jax.Array:
    """A function of leaf and step: the same on all replicas, and after a restore."""
    return jnp.uint32(zlib.crc32(name.encode())) + count.astype(jnp.uint32)
