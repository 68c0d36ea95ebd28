"""LDAdam's direction: Adam in a subspace that moves a little at every step."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from optax_structured.low_rank.leaves import Projected, begun_by_field, plan
from optax_structured.low_rank.refit import seed_of
from optax_structured.low_rank.refresh import Periodic
from optax_structured.low_rank.residuals import Drop, Step
from optax_structured.low_rank.shardings import Places
from optax_structured.low_rank.spec import LowRank, completed
from optax_structured.low_rank.state_check import check_leaves
from optax_structured.low_rank.transports import Keep
from optax_structured.meshes import placement
from optax_structured.meshes.placement import product
from optax_structured.projectors import SVD, OneSided, SubspaceIteration
from optax_structured.projectors.base import Basis, Refit
from optax_structured.projectors.frames import Frame
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import Bases, ErrorBuffer, FirstMoment, SecondMoment
from optax_structured.transforms.adam import average, check_adam, divided
from optax_structured.trees import Rules, as_rules
from optax_structured.trees.checks import check_fraction
from optax_structured.trees.precision import (
    as_stored,
    as_update,
    at_least_float32,
    finite,
    scalar_dtype,
    wide_dtype,
)
from optax_structured.trees.tree_checks import check_real


class LDAdamState(NamedTuple):
    """State of `scale_by_ldadam`; dictionaries are by `trees.state_key` of the leaf."""

    clock: Clock  # steps since init, for schedules
    mean: jax.Array  # () float32 or wider: what b1 averages ones to, 1 - b1^t
    mean_square: jax.Array  # () float32 or wider: the same for b2
    bases: Bases[Any]  # of the projected leaves: (*batch, rank, size), new at every step
    fitted: Any  # of the projected leaves: (*batch,) bool, False until a usable gradient came
    mu: FirstMoment[Any]  # (*batch, rank, length), or like the plain leaf: M
    nu: SecondMoment[Any]  # as mu: V
    error: ErrorBuffer[Any]  # of the projected leaves, like them: what earlier steps left out


@dataclasses.dataclass(frozen=True)
class SVDStart(SubspaceIteration):
    """Subspace iteration that begins at the leading singular vectors of the first gradient."""

    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        basis, begun = SVD().refit(step._replace(due=step.due & ~step.fitted))
        basis, moved = super().refit(step._replace(basis=basis, due=step.due & step.fitted))
        return basis, begun | moved


_DEFAULTS: dict[str, Any] = {
    "period": 1,
    "projector": SVDStart(),
    "refresh": Periodic(),
    "residual": Drop(),
    "transport": Keep(),
}


def scale_by_ldadam(
    low_rank: LowRank | Rules,
    *,
    b1: ScalarOrSchedule = 0.908,
    b2: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    rho: ScalarOrSchedule = 0.908,
    error_feedback: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace that follows momentum and gradient at every step.

    With E what earlier steps left out, :math:`\hat M, \hat V` the debiased moments, and
    :math:`\bar P` the basis before, each step takes

    .. math::
        A &= G + E, \qquad B = \rho \bar P \hat M + (1-\rho) A, \qquad
            P = \operatorname{qr}(B B^\top \bar P) \\
        C &= P^\top \bar P, \qquad M' = C M, \qquad
            \hat V' = |(C \circ C)(\hat V - \hat M^2) + (C \hat M)^2| \\
        E &\leftarrow A - P P^\top A + \tfrac{b_1}{1-b_1}(\bar P M - P M')

    then Adam's averages of :math:`P^\top A` on top of the moved moments, and lifts its direction.

    Args:
      low_rank: a `LowRank`, or `rules` of them; only rank, axes, projector and dtype apply. Square
        matrices compress rows where the side is "small", as the published code does.
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to its corrected root, a number or schedule.
      rho: share of the momentum in what the subspace is fitted to, in [0, 1), a number or schedule.
      error_feedback: keep E.

    Returns:
      An element that needs no `params`. Its state is `LDAdamState`.

    Raises:
      TypeError, ValueError: a value out of range, a `LowRank` with a part that LDAdam prescribes.

    Equals, in rotated coordinates, `optax.scale_by_adam` for a basis that never moves.

    Example: see `ldadam`.
    """
    check_adam(b1, b2, eps)
    check_fraction("rho", rho)
    table = _prescribed(low_rank)

    def init(params: Any) -> LDAdamState:
        check_real("ldadam", params)
        leaves, dtype = plan(table, params), scalar_dtype(params)
        scalars = new_clock(), jnp.zeros((), dtype), jnp.zeros((), dtype)
        if not leaves:  # the placeholder of optax.tree.map_params
            return LDAdamState(*scalars, *(jnp.zeros(()) for _ in range(5)))
        return LDAdamState(*scalars, *begun_by_field(leaves, begun, _HELD).values())

    def begun(leaf: Any, p: Projected | None) -> dict[str, Any]:
        """What the state holds of a leaf before the first step, by field."""
        if p is None:
            mu, nu = (jnp.zeros_like(at_least_float32(leaf)) for _ in range(2))
            return {"mu": mu, "nu": nu}
        spec, frame = _left(p)
        places, wide = Places(frame, leaf), wide_dtype(leaf)
        mu, nu = (places.low(frame.low_shape, wide) for _ in range(2))
        parts = {
            "bases": jax.tree.map(places.basis, spec.projector.init(frame, wide, p.name)),
            "fitted": places.basis(jnp.zeros(frame.batch, bool)),
            "mu": mu,
            "nu": nu,
        }
        if error_feedback:
            parts["error"] = placement.zeros(frame.shape, wide, *(places.leaf or ()))
        return parts

    def update(
        updates: Any, state: LDAdamState, params: Any = None, **_: Any
    ) -> tuple[Any, LDAdamState]:
        leaves = plan(table, updates)
        check_leaves("scale_by_ldadam", leaves, begun, _HELD, state)
        if not leaves:
            return updates, state
        decays = _Decays(*(now(x, state.clock) for x in (b1, b2, eps, rho)))
        mean = average(state.mean, 1.0, decays.b1)
        square = average(state.mean_square, 1.0, decays.b2)
        # Dictionaries of its own, which the leaves below fill in.
        new = LDAdamState(tick(state.clock), mean, square, *map(dict, state[3:]))
        structure: Any = jax.tree.structure(updates)
        weights = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        out = []
        for (key, (leaf, p)), weight in zip(leaves.items(), weights, strict=True):
            wide = wide_dtype(leaf if weight is None else weight)
            gradient = finite(jnp.asarray(leaf, wide))
            if p is None:
                direction = _adam(new, key, gradient, decays)
            else:
                direction = _moved(state, new, key, p, gradient, decays)
            out.append(placement.like(as_update(direction, leaf, weight), gradient))
        return structure.unflatten(out), as_stored(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


_HELD = ("bases", "fitted", "mu", "nu", "error")


class _Decays(NamedTuple):
    """The scalars of one step."""

    b1: Any
    b2: Any
    eps: Any
    rho: Any


def _moved(
    old: LDAdamState, new: LDAdamState, key: str, p: Projected, leaf: jax.Array, decays: _Decays
) -> jax.Array:
    """The direction of one projected leaf; what it leaves behind goes into the dicts of `new`."""
    spec, frame = _left(p)
    projector, places = spec.projector, Places(frame, leaf)
    kept = old.error.get(key)
    a = frame.axes.to_matrix(leaf if kept is None else leaf + kept)
    before = Step(spec, frame, places.factors(spec, old.bases[key]), a, 1.0, old.clock.count)
    mu, nu = at_least_float32(old.mu[key]), at_least_float32(old.nu[key])
    # The weights that the moments hold; before the first step they hold nothing, with any weight.
    first, second = (
        jnp.where(total == 0, 1, total).astype(mu.dtype) for total in (old.mean, old.mean_square)
    )
    rho = jnp.asarray(decays.rho, a.dtype)
    target = rho * before.lift(places.low_where_used(mu / first)) + (1 - rho) * a
    always = jnp.ones(frame.batch, bool)
    seed = seed_of(p.name) + old.clock.count.astype(jnp.uint32)
    basis, usable = projector.refit(
        Refit(frame, *stop_gradient((old.bases[key], target)), always, old.fitted[key], seed)
    )
    rotation = projector.overlap(frame, old.bases[key], basis)
    moved, nu = variance_aware(rotation, mu, nu, first, second)
    step = before._replace(factors=places.factors(spec, basis))
    low = step.project()
    new.mu[key] = placement.like(moved, mu)
    new.nu[key] = placement.like(nu, mu)
    new.bases[key], new.fitted[key] = basis, old.fitted[key] | usable
    direction = _adam(new, key, places.low_where_stored(low), decays)
    if kept is not None:
        share = jnp.asarray(decays.b1, a.dtype) / (1 - jnp.asarray(decays.b1, a.dtype))
        gone = step.lift(low + places.low_where_used(share * moved))
        left = a + before.lift(places.low_where_used(share * mu)) - gone
        new.error[key] = placement.like(frame.axes.from_matrix(left, frame.shape), kept)
    update = step.lift(places.low_where_used(direction))
    return frame.axes.from_matrix(update, frame.shape)


def variance_aware(
    rotation: jax.Array, mu: jax.Array, nu: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adam's biased moments in a new basis; `first` and `second` are the weights they hold."""
    c = rotation.astype(mu.dtype)
    mean = mu / first
    moved = product(c, mean)
    variance = product(c * c, nu / second - mean**2)
    return first * moved, second * jnp.abs(variance + moved**2)


def _adam(state: LDAdamState, key: str, gradient: jax.Array, decays: _Decays) -> jax.Array:
    """One step of Adam on a leaf of `state`, low-rank or plain, whose totals are of this step."""
    mu = state.mu[key] = average(state.mu[key], gradient, decays.b1)
    nu = state.nu[key] = average(state.nu[key], jnp.square(gradient), decays.b2)
    mean, square = mu / state.mean.astype(mu.dtype), nu / state.mean_square.astype(nu.dtype)
    return divided(mean, square, decays.eps)


def _left(p: Projected) -> tuple[Any, Frame]:
    """The record and view of a leaf: square matrices compress rows where nothing else is said."""
    *_, m, n = p.spec.axes.matrix_shape(p.frame.shape)
    if m != n or p.spec.axes.side != "small":
        return p.spec, p.frame
    spec = dataclasses.replace(p.spec, axes=dataclasses.replace(p.spec.axes, side="rows"))
    return spec, spec.frame(p.frame.shape)


def _prescribed(low_rank: Any) -> Rules:
    """The table, complete; nothing in it contradicts LDAdam."""
    for spec in as_rules(low_rank).values:
        if not isinstance(spec, LowRank):
            continue
        for name in ("refresh", "residual", "transport", "codec"):
            if (given := getattr(spec, name)) is not None:
                raise ValueError(
                    f"LDAdam prescribes its {name}, but the LowRank has {name}={given!r}: leave it "
                    "out, or compose low_rank_projection with debiased_adam"
                )
        if spec.period not in (None, 1):
            raise ValueError(
                f"LDAdam moves its subspace at every step, but the LowRank has period="
                f"{spec.period!r}: leave it out, or use galore(..., inner=debiased_adam()), whose "
                "subspaces stay for a period"
            )
        if not isinstance(spec.projector or SVDStart(), OneSided):
            raise ValueError(f"LDAdam needs a projector with one matrix, got {spec.projector!r}")
    return completed(low_rank, **_DEFAULTS)
