"""The two halves of the update of a projected leaf, before and after the inner transformation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.low_rank.inner_state import Moment
from optax_structured.low_rank.refit import Held, refit
from optax_structured.low_rank.residuals import InTurn, Step
from optax_structured.low_rank.shardings import Places
from optax_structured.projectors.frames import Frame
from optax_structured.transforms.nonfinite import new_if
from optax_structured.trees.precision import finite, wide_dtype
from optax_structured.xla.alike import traced_once


class Kind(NamedTuple):
    """What leaves that are alike share, beside shapes and dtypes."""

    spec: Any  # the LowRank
    frame: Frame
    moments: tuple[Moment, ...]  # what the arrays of `Held.moments` are


class Before(NamedTuple):
    """A leaf before the step."""

    gradient: jax.Array  # the leaf, in the precision that its low-rank leaf has, or narrower
    held: Held
    residual: Any  # memory of the residual rule
    due: jax.Array  # bool, () or (*batch,): whether to refit
    seed: Any  # uint32, of the leaf


class Between(NamedTuple):
    """A leaf whose low-rank part is ready for the inner transformation."""

    held: Held
    low: jax.Array  # (*batch, rank, length): R
    factors: Any  # what products read of the basis
    matrix: jax.Array  # (*batch, m, n): the gradient, with what earlier steps left out


@traced_once
def project(kind: Kind, leaf: Before, count: jax.Array, usable: jax.Array | None) -> Between:
    """Fits the basis P if that is due, and projects: :math:`R = P^\\top G`."""
    spec, frame, moments = kind
    places = Places(frame, leaf.gradient)
    in_turn = places.in_turn(spec)
    matrix = frame.axes.to_matrix(spec.residual.absorb(leaf.residual, leaf.gradient))
    seed = leaf.seed + count.astype(jnp.uint32)
    held = refit(spec, frame, moments, in_turn, usable, leaf.held, leaf.due, matrix, seed)
    factors = InTurn(held.stored) if in_turn else places.factors(spec, held.stored)
    low = Step(spec, frame, factors, matrix, None, count).project()
    low = finite(low).astype(wide_dtype(leaf.gradient))
    return Between(held, places.low_where_stored(low), factors, matrix)


@traced_once
def lift(
    kind: Kind,
    leaf: Before,
    between: Between,
    direction: jax.Array,
    scale: Any,
    count: jax.Array,
    usable: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """The update of the leaf, :math:`a P N` and what the residual rule adds; what it remembers."""
    spec, frame, _ = kind
    places = Places(frame, leaf.gradient)
    step = Step(spec, frame, between.factors, between.matrix, scale, count)
    lows = map(places.low_where_used, (between.low, direction))
    matrix, residual = spec.residual.combine(leaf.residual, step, *lows)
    residual = jax.tree.map(functools.partial(new_if, usable), residual, leaf.residual)
    return frame.axes.from_matrix(matrix, frame.shape), residual
