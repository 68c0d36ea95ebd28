"""Any optax transformation, run inside low-rank subspaces of the gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.low_rank import inner_state
from optax_structured.low_rank.halves import Before, Kind, lift, project
from optax_structured.low_rank.leaves import Leaves, Projected, begun_by_field, plan
from optax_structured.low_rank.refit import Held, RefreshState, seed_of
from optax_structured.low_rank.refresh import Periodic
from optax_structured.low_rank.residuals import Drop
from optax_structured.low_rank.shardings import Places
from optax_structured.low_rank.spec import LowRank, completed
from optax_structured.low_rank.state_check import check_leaves, update_inner
from optax_structured.low_rank.stored_basis import encoded
from optax_structured.meshes import placement
from optax_structured.projectors import SubspaceIteration
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.states.roles import Bases, ErrorBuffer
from optax_structured.transforms.nonfinite import Skipping, new_if
from optax_structured.trees import Rules
from optax_structured.trees.checks import check_nonnegative
from optax_structured.trees.precision import as_update, at_least_float32, finite, wide_dtype
from optax_structured.trees.tree_checks import check_same_tree
from optax_structured.xla.stacks import Rows, Stacks

DEFAULTS: dict[str, Any] = {
    "period": 200,
    "projector": SubspaceIteration(),
    "refresh": Periodic(),
    "residual": Drop(),
}


class LowRankState(NamedTuple):
    """State of `low_rank_projection`; dictionaries are by `trees.state_key` of the leaf."""

    count: jax.Array  # type: ignore[assignment]  # () int32: updates so far
    bases: Bases[dict[str, Any]]  # of the projected leaves: as the projector or codec says
    refresh: dict[str, RefreshState]  # of the projected leaves
    residual: ErrorBuffer[dict[str, Any]]  # of the projected leaves: memory of the residual rule
    inner: Any  # of the inner transformation, on {key: low-rank leaf, or plain leaf}


def low_rank_projection(
    inner: optax.GradientTransformation,
    low_rank: LowRank | Rules,
    *,
    scale: ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs any transformation inside low-rank subspaces of the gradients.

    For each projected leaf, oriented as (\*batch, size, length) with the compressed axis first, and
    P its basis of shape (\*batch, size, rank), refit periodically,

    .. math:: R = P^\top G, \qquad N = \text{inner}(R), \qquad \text{update} = a\,P N

    (and what the residual rule adds). The inner transformation sees one flat dictionary, from path
    (joined by ":") to low-rank leaf R of shape (\*batch, rank, length), float32 at least. Leaves
    that are not projected pass through it unchanged in shape, and their updates without :math:`a`.

    A gradient that is not finite counts as zero there, and neither it nor a zero gradient ever
    becomes a basis: the leaf (or matrix of a stack) keeps its old one, or waits for its first.

    Args:
      inner: any transformation that needs no parameters: `optax.scale_by_adam()`,
        `optax.trace(0.9)`, `optax.scale_by_lion()`, `optax.scale_by_factored_rms()`, chains of
        them. Weight decay and the learning rate go outside.
      low_rank: a `LowRank` for all leaves that can take it, or `rules` of them and None. Stacked
        norm scales look like matrices: exclude them by `rules`.
      scale: :math:`a`, a number or schedule; 1. GaLore pre-trains with 0.25.

    Returns:
      An element that passes unknown extra arguments on to `inner`. The extra argument `refresh`, a
      bool or a tree of them like the parameters, says which leaves to fit now, instead of their
      own rule; new leaves are still fitted on their first steps. Its state is `LowRankState`.

    Raises:
      TypeError, ValueError: no leaf can be projected, a rule that matches nothing or gives a leaf
        what it cannot take, or an inner transformation that needs parameters.

    Equals `inner` in rotated coordinates at full rank, and, with `optax.identity` inside, the
    gradient itself.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> adam = oxs.low_rank_projection(optax.scale_by_adam(), oxs.LowRank(rank=1))
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
      >>> state = adam.init(params)
      >>> state.inner.mu["kernel"].shape, state.inner.mu["bias"].shape
      ((1, 4), (3,))

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, ICML 2024.
    """
    check_nonnegative("scale", scale)
    table = completed(low_rank, **DEFAULTS)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LowRankState:
        leaves = plan(table, params)
        count = jnp.zeros((), jnp.int32)
        if not leaves:  # the placeholder of optax.tree.map_params, or nothing to train
            return LowRankState(count, *(jnp.zeros(()) for _ in range(4)))  # type: ignore[arg-type]
        held = begun_by_field(leaves, _begun, _HELD)
        low = _low_leaves(leaves)
        inner_state.check(inner, low)
        return LowRankState(count=count, **held, inner=inner.init(low))

    def update(
        updates: Any,
        state: LowRankState,
        params: Any = None,
        *,
        refresh: Any = None,
        usable: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, LowRankState]:
        if params is not None:
            check_same_tree("low_rank_projection", updates, params, whose="the parameters")
        leaves = plan(table, updates)
        count = state.count
        counted = new_if(usable, optax.safe_increment(count), count)
        a = scale(count) if callable(scale) else scale
        check_leaves("low_rank_projection", leaves, _begun, _HELD, state)
        if not leaves:
            return updates, state._replace(count=counted)
        masks = _masks(refresh, updates, leaves)
        moving = [key for key, (_, p) in leaves.items() if p and p.spec.transport.moves_moments]
        found = inner_state.find(inner, lambda: _low_leaves(leaves), moving)
        moments = inner_state.read(state.inner, found)
        structure: Any = jax.tree.structure(updates)
        weights = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        low: dict[str, jax.Array] = {}
        before: dict[str, Before] = {}
        kinds: list[Kind] = []
        for (key, (leaf, p)), weight in zip(leaves.items(), weights, strict=True):
            wide = wide_dtype(leaf if weight is None else weight)
            if p is None:
                low[key] = finite(jnp.asarray(leaf, wide))
                continue
            leaf = leaf.astype(wide) if wide_dtype(leaf) != wide else leaf
            spec, clock, due = p.spec, state.refresh[key], masks.get(key)
            if due is None:
                due = spec.refresh.due(clock.rule, count, spec.period, p.share)
            moved = found.get(key, {})
            held = Held(state.bases[key], clock, tuple(moments[key][place] for place in moved))
            before[key] = Before(leaf, held, state.residual[key], jnp.asarray(due), seed_of(p.name))
            kinds.append(Kind(spec, p.frame, tuple(moved.values())))
        # Fit the bases P that are due, and R = P' G; small leaves that are alike as one stack, if
        # all are due at the same steps.
        apart = [i for i, k in enumerate(kinds) if masks or type(k.spec.refresh) is not Periodic]
        stacks, rows = Stacks(kinds, [*before.values()], apart), Rows()
        stacked = stacks.stack([*before.values()])
        between = stacks.map(functools.partial(project, count=count, usable=usable), stacked)
        lows = stacks.unstack([x.low for x in between], rows)
        kept = stacks.unstack_apart([x.held for x in between], rows)
        low |= zip(before, lows, strict=True)
        new = dict(zip(before, kept, strict=True))
        # N = inner(R), of all leaves at once.
        for key, moved in found.items():
            moments[key] = dict(zip(moved, new[key].moments, strict=True))
        within = inner_state.write(state.inner, moments)
        directions, within = update_inner(
            "low_rank_projection", inner, leaves, low, within, usable, extra
        )
        # a P N, and what the residual rule adds.
        of_kind = functools.partial(lift, scale=a, count=count, usable=usable)
        used = stacks.stack([directions[key] for key in before])
        ends = stacks.map(of_kind, stacked, between, used)
        lifted = dict(zip(before, stacks.unstack([x for x, _ in ends], rows), strict=True))
        kept = stacks.unstack_apart([memory for _, memory in ends], rows)
        memories = dict(zip(before, kept, strict=True))
        out = []
        for (key, (leaf, p)), weight in zip(leaves.items(), weights, strict=True):
            update = directions[key] if p is None else lifted[key]
            update = as_update(update, leaf, weight)
            out.append(update if p is None else placement.like(update, leaf))
        return structure.unflatten(out), LowRankState(
            count=counted,
            bases={key: x.stored for key, x in new.items()},
            refresh={key: x.refresh for key, x in new.items()},
            residual=memories,
            inner=within,
        )

    return Skipping(init, update)


_HELD = ("bases", "refresh", "residual")


def _begun(leaf: Any, p: Projected | None) -> dict[str, Any]:
    """What the state holds of a leaf before the first step, by field; of a plain one nothing."""
    if p is None:
        return {}
    dtype, spec, frame = wide_dtype(leaf), p.spec, p.frame
    places = Places(frame, leaf)
    home = places.basis if spec.codec is None else places.codes
    missing = places.basis(jnp.full(frame.batch, spec.projector.first_fits, jnp.int8))
    basis = encoded(spec, frame, spec.projector.init(frame, dtype, p.name))
    return {
        "bases": jax.tree.map(home, basis),
        "refresh": RefreshState(missing, spec.refresh.init(frame, spec.period)),
        "residual": spec.residual.init(frame, dtype, places),
    }


def _low_leaves(leaves: Leaves) -> dict[str, Any]:
    """What the inner transformation is initialised with: zeros for the projected leaves."""
    return {
        key: at_least_float32(leaf)
        if p is None
        else Places(p.frame, leaf).low(p.frame.low_shape, wide_dtype(leaf))
        for key, (leaf, p) in leaves.items()
    }


def _masks(refresh: Any, updates: Any, leaves: Leaves) -> dict[str, Any]:
    """The extra argument `refresh`, by key."""
    if refresh is None:
        return {}
    structure: Any = jax.tree.structure(refresh)
    if structure.num_nodes == 1:
        return dict.fromkeys(leaves, jnp.asarray(refresh, bool))
    if structure != jax.tree.structure(updates):
        raise ValueError(
            "the extra argument refresh must be one bool, or a tree of bools like the parameters; "
            f"got the structure {structure}"
        )
    masks = (jnp.asarray(x, bool) for x in jax.tree.leaves(refresh))
    return dict(zip(leaves, masks, strict=True))
