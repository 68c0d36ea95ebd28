"""Fitting the basis of a leaf anew, when it is due and its gradient can be used."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.branch import branch
from optax_structured.low_rank import inner_state
from optax_structured.low_rank.frames import matrix_where
from optax_structured.low_rank.leaves import Projected
from optax_structured.low_rank.transports import stores_matrix
from optax_structured.trees import placement
from optax_structured.trees.precision import at_least_float32


class RefreshState(NamedTuple):
    """When a leaf was and will be fitted."""

    fitted: jax.Array  # (*batch,) bool: False until a usable gradient came; then due at every step
    rule: Any  # memory of the refresh rule


Held = tuple[Any, RefreshState, inner_state.Fields]  # basis as stored, memory, moments beside it


class Refits:
    """Fits leaf after leaf; what is the same for leaves that are alike is traced but once."""

    def __init__(self, count: jax.Array) -> None:
        self._count = count
        self._traced: dict[Any, Callable[..., Held]] = {}

    def __call__(self, p: Projected, held: Held, matrix: jax.Array, mask: Any) -> Held:
        """What is stored of one leaf, fitted if it is due, and what depends on it."""
        due = mask
        if due is None:
            due = p.spec.refresh.due(held[1].rule, self._count, p.spec.period, p.share)
        seed = seed_of(p.frame.name, self._count)
        if _looks_at_no_name(p.spec):
            p = dataclasses.replace(p, frame=dataclasses.replace(p.frame, name=""))
        key = id(p.spec), p.frame
        if key not in self._traced:
            self._traced[key] = jax.jit(functools.partial(_refit, p))
        return self._traced[key](due, held, matrix, self._count, seed)


def _looks_at_no_name(spec: Any) -> bool:
    """Whether one trace serves leaves of any name.

    `RandomProjection` finds its basis by the name, and parts of a user's own may do as they like.
    """
    parts = spec.projector, spec.refresh, spec.transport
    ours = all(type(part).__module__.startswith(f"{__package__}.") for part in parts)
    return ours and stores_matrix(spec.projector)


def _refit(
    p: Projected,
    due: jax.Array,
    held: Held,
    matrix: jax.Array,
    count: jax.Array,
    seed: jax.Array,
) -> Held:
    """The fit of one leaf, if some matrix of it is due."""

    def keep(held: Held, *_: Any) -> Held:
        return held

    operands = held, due, matrix, count, seed
    return branch(jnp.any(due | ~held[1].fitted), functools.partial(_fit, p), keep, *operands)


def _fit(
    p: Projected,
    held: Held,
    due: jax.Array,
    matrix: jax.Array,
    count: jax.Array,
    seed: jax.Array,
) -> Held:
    """Everything that changes with the basis, for the matrices that are due and usable."""
    frame, projector, transport = p.frame, p.spec.projector, p.spec.transport
    stored, memory, fields = held
    matrix = at_least_float32(matrix)
    size = jnp.sum(jnp.abs(matrix), (-2, -1))
    # Worked out here again: handed into the branch, it would be one more kernel a leaf.
    waiting = ~memory.fitted  # matrix by matrix: one without a fit yet moves no other
    usable = (due | waiting) & jnp.isfinite(size) & (size > 0)
    basis = p.decoded(stored)
    fit = projector.refit_where(usable, frame, basis, frame.turn(matrix), memory.fitted, seed)
    rule = p.spec.refresh.after(memory.rule, projector, frame, basis, fit, memory.fitted, usable)
    new = transport.basis(projector, frame, basis, fit)
    again = usable & memory.fitted  # before the first fit there is nothing to turn to
    if new is not fit:
        new = jax.tree.map(lambda n, f: matrix_where(again, n, f), new, fit)
    if fields:
        rotation = functools.cache(lambda: projector.overlap(frame, basis, new))
        moved = {k: transport.moments(v, rotation, count) for k, v in fields.items()}
        fields = jax.tree.map(
            lambda m, v: placement.like(matrix_where(again, m, v), v), moved, fields
        )
    if p.spec.codec is not None:  # decoded and encoded again, kept codes might differ
        new = jax.tree.map(lambda n, s: matrix_where(usable, n, s), p.encoded(new), stored)
    stored = jax.tree.map(placement.like, new, stored)
    return stored, RefreshState(memory.fitted | usable, rule), fields


def seed_of(name: str, count: jax.Array) -> jax.Array:
    """A function of leaf and step: the same on all replicas, and after a restore."""
    return jnp.uint32(zlib.crc32(name.encode())) + count.astype(jnp.uint32)
