"""Refitting the basis of a leaf, when it is due and its gradient can be used."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from optax_structured.low_rank.inner_state import Moment
from optax_structured.low_rank.refresh import Refitted
from optax_structured.low_rank.stored_basis import decoded, encoded
from optax_structured.meshes import placement
from optax_structured.projectors.base import Projector, Refit
from optax_structured.projectors.frames import Frame, matrix_where
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
    moments: tuple[jax.Array, ...]  # of the inner state, those that are moved


def refit(
    spec: Any,
    frame: Frame,
    moments: tuple[Moment, ...],
    in_turn: bool,
    usable: jax.Array | None,
    held: Held,
    due: Any,
    *operands: jax.Array,
) -> Held:
    """What is held of one leaf, after a fit of the matrices that are due.

    Args:
      spec, frame: of the leaf.
      moments: what the arrays of `held.moments` are.
      in_turn: fit the matrices of a stack one after the other.
      usable: bool, (): whether the step counts; None: it does.
      held: before.
      due: bool, () or (\\*batch,).
      operands: (\\*batch, m, n), the gradient to fit, in its own orientation; a seed, uint32.
    """

    def keep(held: Held, *_: Any) -> Held:
        return held

    fit = functools.partial(_fit, spec, frame, moments, in_turn)
    due = due | (held.refresh.missing > 0)  # matrix by matrix: a new one moves no other
    due = due if usable is None else due & usable
    return branch(jnp.any(due), fit, keep, held, due, *operands)


def _fit(
    spec: Any,
    frame: Frame,
    moments: tuple[Moment, ...],
    in_turn: bool,
    held: Held,
    due: jax.Array,
    matrix: jax.Array,
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
    moved = []
    for moment, value in zip(moments, held.moments, strict=True):
        chosen = matrix_where(again, transport.move(moment, value, rotation), value)
        moved.append(placement.like(chosen, value))
    if spec.codec is not None:  # decoded and encoded again, kept codes might differ
        codes = encoded(spec, frame, new)
        new = jax.tree.map(lambda n, s: matrix_where(usable, n, s), codes, held.stored)
    stored = jax.tree.map(placement.like, new, held.stored)
    missing -= (unfinished & usable).astype(jnp.int8)
    return Held(stored, RefreshState(missing, rule), tuple(moved))


def _fit_in_turn(projector: Projector, step: Refit) -> tuple[Any, jax.Array]:
    def one(basis: Any, matrix: jax.Array, due: jax.Array, fitted: jax.Array) -> Any:
        return projector.refit(Refit(step.frame.one, basis, matrix, due, fitted, step.seed))

    stacks = step.basis, step.matrix, step.due, step.fitted
    return one_by_one(one, len(step.frame.batch), *stacks)


def seed_of(name: str) -> np.uint32:
    """A function of the leaf: the same on all replicas, and after a restore."""
    return np.uint32(zlib.crc32(name.encode()))
