"""Refitting the basis of a leaf, when it is due and its gradient can be used."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from optax_structured.low_rank.inner_state import Moment
from optax_structured.low_rank.leaves import Projected
from optax_structured.low_rank.refresh import Refitted
from optax_structured.low_rank.stored_basis import decoded, encoded
from optax_structured.meshes import placement
from optax_structured.projectors.base import Projector, Refit
from optax_structured.projectors.frames import Frame, matrix_where
from optax_structured.xla.alike import traced_once
from optax_structured.xla.conditional import branch
from optax_structured.xla.one_by_one import one_by_one


class RefreshState(NamedTuple):
    """When a leaf was and will be fitted."""

    missing: jax.Array  # (*batch,) int8: of the projector's first fits; due at every step until 0
    rule: Any  # memory of the refresh rule


class Held(NamedTuple):
    """What changes with the basis of a leaf."""

    stored: Any  # the basis, as it is stored
    refresh: RefreshState
    moments: dict[str, jax.Array]  # of the inner state, those that are moved


def refit(
    p: Projected,
    held: Held,
    moments: dict[str, Moment],
    matrix: jax.Array,
    mask: Any,
    count: jax.Array,
    in_turn: bool = False,
) -> Held:
    """What is held of one leaf, after a fit of the matrices that are due.

    Args:
      p, held: the leaf, and what was held before.
      moments: what the arrays of `held.moments` are.
      matrix: (\\*batch, m, n), the gradient to fit, in its own orientation.
      mask: bool, whether the leaf is due; None: its rule decides.
      count: steps done.
      in_turn: fit the matrices of a stack one after the other.
    """
    rule = p.spec.refresh
    due = rule.due(held.refresh.rule, count, p.spec.period, p.share) if mask is None else mask
    static = p.spec, p.frame, tuple(moments.items()), in_turn
    return _where_due(static, due, held, matrix, count, seed_of(p.name, count))


@traced_once
def _where_due(static: Any, due: Any, held: Held, *operands: jax.Array) -> Held:
    def keep(held: Held, *_: Any) -> Held:
        return held

    due = due | (held.refresh.missing > 0)  # matrix by matrix: a new one moves no other
    return branch(jnp.any(due), functools.partial(_fit, *static), keep, held, due, *operands)


def _fit(
    spec: Any,
    frame: Frame,
    moments: tuple[tuple[str, Moment], ...],
    in_turn: bool,
    held: Held,
    due: jax.Array,
    matrix: jax.Array,
    count: jax.Array,
    seed: jax.Array,
) -> Held:
    """Everything that changes with the basis, for the matrices that are due and usable."""
    projector, transport, missing = spec.projector, spec.transport, held.refresh.missing
    fitted, unfinished = missing < projector.first_fits, missing > 0
    # A constant for derivatives: a subspace has none where singular values cross.
    basis, matrix = stop_gradient((decoded(spec, frame, held.stored), matrix))
    step = Refit(frame, basis, matrix, due, fitted, seed)
    fit, usable = _fit_in_turn(projector, step) if in_turn else projector.refit(step)
    refitted = Refitted(projector, frame, basis, fit, ~unfinished, usable)
    rule = spec.refresh.after(held.refresh.rule, refitted)
    new = transport.basis(projector, frame, basis, fit)
    again = usable & fitted  # before the first fit there is nothing to turn to
    if new is not fit:
        new = jax.tree.map(lambda n, f: matrix_where(again, n, f), new, fit)
    rotation = functools.cache(lambda: projector.overlap(frame, basis, new))
    moved = {}
    for place, moment in moments:
        value = held.moments[place]
        chosen = matrix_where(again, transport.move(moment, value, rotation), value)
        moved[place] = placement.like(chosen, value)
    if spec.codec is not None:  # decoded and encoded again, kept codes might differ
        codes = encoded(spec, frame, new)
        new = jax.tree.map(lambda n, s: matrix_where(usable, n, s), codes, held.stored)
    stored = jax.tree.map(placement.like, new, held.stored)
    return Held(stored, RefreshState(missing - (unfinished & usable).astype(jnp.int8), rule), moved)


def _fit_in_turn(projector: Projector, step: Refit) -> tuple[Any, jax.Array]:
    def one(basis: Any, matrix: jax.Array, due: jax.Array, fitted: jax.Array) -> Any:
        return projector.refit(Refit(step.frame.one, basis, matrix, due, fitted, step.seed))

    stacks = step.basis, step.matrix, step.due, step.fitted
    return one_by_one(one, len(step.frame.batch), *stacks)


def seed_of(name: str, count: jax.Array) -> jax.Array:
    """A function of leaf and step: the same on all replicas, and after a restore."""
    return np.uint32(zlib.crc32(name.encode())) + count.astype(jnp.uint32)
