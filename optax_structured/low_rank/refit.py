"""Refitting the basis of a leaf, when it is due and its gradient can be used."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.low_rank import inner_state
from optax_structured.low_rank.leaves import Projected
from optax_structured.low_rank.transports import stores_matrix
from optax_structured.meshes import placement
from optax_structured.projectors.frames import matrix_where
from optax_structured.xla.conditional import branch


class RefreshState(NamedTuple):
    """When a leaf was and will be fitted."""

    missing: jax.Array  # (*batch,) int8: of the projector's first fits; due at every step until 0
    rule: Any  # memory of the refresh rule


Held = tuple[Any, RefreshState, inner_state.Fields]  # basis as stored, memory, moments beside it


class Refits:
    """Fits leaf after leaf; what is the same for leaves that are alike is traced but once."""

    def __init__(self, count: jax.Array) -> None:
        self._count = count
        self._due: dict[Any, Any] = {}
        self._traced: dict[Any, Callable[..., Held]] = {}

    def __call__(self, p: Projected, held: Held, matrix: jax.Array, mask: Any) -> Held:
        """What is stored of one leaf, fitted if it is due, and what depends on it."""
        due = self._is_due(p, held[1].rule) if mask is None else mask
        seed = _number_of(p.frame.name)
        if _looks_at_no_name(p.spec):
            p = dataclasses.replace(p, frame=dataclasses.replace(p.frame, name=""))
        key = p.spec, p.frame
        if key not in self._traced:
            self._traced[key] = jax.jit(functools.partial(_refit, p))
        return self._traced[key](due, held, matrix, self._count, seed)

    def _is_due(self, p: Projected, memory: Any) -> Any:
        spec = p.spec
        if not spec.refresh.together:
            return spec.refresh.due(memory, self._count, spec.period, p.share)
        if spec not in self._due:
            self._due[spec] = spec.refresh.due(memory, self._count, spec.period, p.share)
        return self._due[spec]


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

    due = due | (held[1].missing > 0)  # matrix by matrix: a new one moves no other
    operands = held, due, matrix, count, seed
    return branch(jnp.any(due), functools.partial(_fit, p), keep, *operands)


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
    fitted, new_one = memory.missing < projector.first_fits, memory.missing > 0
    basis = p.decoded(stored)
    seed = _at_step(seed, count)
    fit, usable = projector.refit_where(due, frame, basis, matrix, fitted, seed)
    rule = p.spec.refresh.after(memory.rule, projector, frame, basis, fit, ~new_one, usable)
    new = transport.basis(projector, frame, basis, fit)
    again = usable & fitted  # before the first fit there is nothing to turn to
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
    return stored, RefreshState(memory.missing - (new_one & usable).astype(jnp.int8), rule), fields


def seed_of(name: str, count: jax.Array) -> jax.Array:
    """A function of leaf and step: the same on all replicas, and after a restore."""
    return _at_step(_number_of(name), count)


def _number_of(name: str) -> np.uint32:
    return np.uint32(zlib.crc32(name.encode()))


def _at_step(number: Any, count: jax.Array) -> jax.Array:
    return number + count.astype(jnp.uint32)
