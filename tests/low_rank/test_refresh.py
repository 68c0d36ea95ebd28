"""When subspaces are fitted: the rules, the mask, and gradients that cannot be used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import assert_equal, normal
from tolerances import ORTHONORMAL

import optax_structured as oxs
from optax_structured import SVD, Lazy, LowRank, Periodic, Staggered, SubspaceIteration
from optax_structured.low_rank import External

SHAPE = (6, 4)


def projection(period=2, projector=SVD(), **parts):  # noqa: B008  (frozen)
    spec = LowRank(2, period, projector=projector, **parts)
    return oxs.low_rank_projection(optax.scale_by_adam(), spec)


def states(tx, grads, masks=None):
    """The state after each step."""
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for t, g in enumerate(grads):
        extra = {} if masks is None else {"refresh": masks[t]}
        updates, state = update(g, state, **extra)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        yield state


def fits(tx, steps=9, names=("w",), masks=None):
    """For each leaf, the steps at which its basis moved: no two gradients are alike."""
    grads = [{name: normal((name, t), SHAPE) for name in names} for t in range(steps)]
    seen = {name: [] for name in names}
    old = tx.init(grads[0]).bases
    for t, state in enumerate(states(tx, grads, masks)):
        for name in names:
            if not jnp.array_equal(state.bases[name], old[name]):
                seen[name].append(t)
        old = state.bases
    return tuple(seen.values()) if len(names) > 1 else seen[names[0]]


def gaps(tx, grads):
    """The steps at which the gap of `Lazy` changed, and to what."""
    found, last = {}, None
    for t, state in enumerate(states(tx, grads)):
        gap = int(state.refresh[""].rule.gap)
        if last not in (None, gap):
            found[t] = gap
        last = gap
    return found


# The rules


def test_a_rule_of_ones_own_is_told_where_the_leaf_is():
    class Early(Periodic):
        def due(self, state, count, period, share):
            return super().due(state, count + int(share * period), period, share)

    names = tuple("abcd")
    assert fits(projection(4, refresh=Early()), 6, names) == ([0, 4], [0, 3], [0, 2], [0, 1, 5])


def test_periodic():
    assert fits(projection(3)) == [0, 3, 6]
    assert fits(projection(1), steps=4) == [0, 1, 2, 3]
    assert fits(projection(3, refresh=Periodic(offset=1))) == [0, 2, 5, 8]


def test_staggered_leaves_take_turns():
    names = ("a", "b", "c", "d")
    tx = projection(4, refresh=Staggered())
    assert fits(tx, names=names) == ([0, 4, 8], [0, 3, 7], [0, 2, 6], [0, 1, 5])


def test_external_waits_for_its_mask():
    tx = projection(refresh=External())
    with pytest.raises(ValueError, match=r"update\(grads, state, params, refresh=mask\)"):
        fits(tx)
    assert fits(tx, masks=[t in (2, 3) for t in range(9)]) == [0, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [Periodic(), Staggered(), Lazy(), External()], ids=repr)
def test_a_mask_overrides_every_rule(refresh):
    tx = projection(2, refresh=refresh)
    assert fits(tx, masks=[True] * 4, steps=4) == [0, 1, 2, 3]
    assert fits(tx, masks=[False] * 4, steps=4) == [0]  # nothing works without a first basis
    masks = [{"a": t == 1, "b": t == 2} for t in range(4)]
    assert fits(tx, names=("a", "b"), masks=masks, steps=4) == ([0, 1], [0, 2])


def test_a_mask_of_another_structure_is_refused():
    with pytest.raises(ValueError, match="one bool, or a tree of bools like the parameters"):
        fits(projection(), masks=[{"another": True}] * 9)


# Lazy: periods of 200 in the paper, of 2 here


@pytest.mark.parametrize("similarity", ["direction", "subspace"])
def test_lazy_gaps_double_while_the_subspace_stays(similarity):
    """Like 200 to 400 at step 1000, then 800 at 1200, and 1600 at 1600."""
    tx = projection(refresh=Lazy(similarity=similarity))
    assert gaps(tx, [normal("g", SHAPE)] * 34) == {10: 4, 12: 8, 16: 16, 32: 32}


def test_lazy_gaps_grow_by_their_factor():
    tx = projection(refresh=Lazy(growth=3.0, memory=1))
    assert gaps(tx, [normal("g", SHAPE)] * 20) == {2: 6, 6: 18, 18: 54}


@pytest.mark.parametrize("similarity", ["direction", "subspace"])
def test_a_threshold_of_one_never_grows(similarity):
    tx = projection(refresh=Lazy(threshold=1.0, memory=1, similarity=similarity))
    assert gaps(tx, [jnp.eye(*SHAPE)] * 9) == {}


@pytest.mark.parametrize("similarity", ["direction", "subspace"])
def test_lazy_keeps_on_fitting_what_moves(similarity):
    tx = projection(refresh=Lazy(threshold=0.9, memory=2, similarity=similarity))
    assert gaps(tx, [normal(t, SHAPE) for t in range(12)]) == {}


@pytest.mark.parametrize("similarity", ["direction", "subspace"])
@pytest.mark.parametrize("projector", [SVD(), SubspaceIteration()], ids=repr)
def test_lazy_has_nothing_to_compare_at_the_first_fits(projector, similarity):
    """Some projectors start from a random basis, some from zeros; some take three steps."""
    tx = projection(refresh=Lazy(similarity=similarity), projector=projector)
    found = [int(state.refresh[""].rule.seen) for state in states(tx, [normal("g", SHAPE)] * 5)]
    assert found == ([0, 0, 1, 1, 2] if projector.first_fits == 1 else [0, 0, 0, 0, 1])


@pytest.mark.parametrize("similarity", ["direction", "subspace"])
def test_lazy_compares_the_matrices_of_a_stack_that_were_fitted_before(similarity):
    """The second matrix is new at step 3, when nothing is due, and has no say until step 4."""
    still, late = normal("g", SHAPE), normal("late", SHAPE)
    grads = [jnp.stack([still, late * (t >= 3)]) for t in range(5)]
    tx = projection(refresh=Lazy(memory=1, similarity=similarity))
    rules = [state.refresh[""].rule for state in states(tx, grads)]
    assert [int(rule.gap) for rule in rules] == [2, 2, 4, 4, 8]
    assert [int(rule.seen) for rule in rules] == [0, 0, 1, 1, 1]
    np.testing.assert_allclose([rule.similarities for rule in rules[2:]], 1.0, rtol=1e-5)


# Gradients that cannot be used


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_the_first_fit_waits_for_a_usable_gradient(bad):
    useless, usable = jnp.full(SHAPE, bad), normal("g", SHAPE)
    first, second, third, _ = states(projection(99), [useless, useless, usable, -usable])
    for state in (first, second):
        assert state.refresh[""].missing
        np.testing.assert_array_equal(state.bases[""], 0.0)
    assert not third.refresh[""].missing
    at_once = next(states(projection(99), [usable]))
    assert_equal(third.bases, at_once.bases)


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_a_refit_without_a_usable_gradient_keeps_the_basis(bad):
    grads = [normal(t, SHAPE) for t in range(5)]
    grads[2] = grads[2].at[1, 1].set(jnp.nan) if jnp.isnan(bad) else jnp.full(SHAPE, bad)
    seen = [state.bases[""] for state in states(projection(2), grads)]
    np.testing.assert_array_equal(seen[2], seen[0])
    assert not jnp.array_equal(seen[4], seen[0])
    defect = seen[4] @ seen[4].T - jnp.eye(2)
    assert jnp.max(jnp.abs(defect)) <= ORTHONORMAL["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("transport", [oxs.Align(), oxs.Rotate(), oxs.Reset()], ids=repr)
def test_matrices_of_a_stack_wait_and_keep_by_themselves(transport):
    """Each goes its own way as if it were alone, whatever its neighbours get."""
    grads = [jnp.stack([normal((t, i), SHAPE) for i in range(3)]) for t in range(5)]
    grads[0] = grads[0].at[0].set(0.0)
    grads[2] = grads[2].at[1].set(jnp.nan)
    together = list(states(projection(2, transport=transport), grads))
    assert together[0].refresh[""].missing.tolist() == [1, 0, 0]
    for i in range(3):
        alone = list(states(projection(2, transport=transport), [g[i] for g in grads]))
        for a, b in zip(alone, together, strict=True):
            # The first fit of a late matrix makes the whole stack look again, and only it moves.
            np.testing.assert_allclose(b.bases[""][i], a.bases[""], atol=1e-5)
            np.testing.assert_allclose(b.inner.mu[""][i], a.inner.mu[""], atol=1e-5)
