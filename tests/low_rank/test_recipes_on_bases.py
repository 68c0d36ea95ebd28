"""What DCT-AdamW, Trion, LDAdam and GradNormLoRP promise beyond their published trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import normal
from tolerances import reordered

from optax_structured.low_rank import (
    DCT,
    SVD,
    Align,
    Drop,
    ErrorFeedback,
    LowRank,
    Periodic,
    SubspaceIteration,
    TwoSided,
    low_rank_projection,
)
from optax_structured.low_rank.ldadam import scale_by_ldadam
from optax_structured.projectors.cosines import columns
from optax_structured.recipes.dct import dct_adamw, trion
from optax_structured.recipes.grad_norm_lorp import grad_norm_lorp
from optax_structured.recipes.ldadam import ldadam
from optax_structured.transforms import accumulate, debiased_adam, newton_schulz
from optax_structured.trees import Axes, rules

EVERY = pytest.mark.parametrize(
    "recipe",
    [dct_adamw, trion, ldadam, grad_norm_lorp],
    ids=lambda recipe: recipe.__name__,
)


def gradients(shape, steps=4):
    return [normal(("gradient", i), shape) for i in range(steps)]


def run(tx, start, grads):
    state, update = tx.init(start), jax.jit(tx.update)
    current = start
    for g in grads:
        updates, state = update(g, state, current)
        current = optax.apply_updates(current, updates)
    return current, state


def projected(state):
    """The first state of a chain that has bases."""
    is_state = lambda s: hasattr(s, "bases")  # noqa: E731
    return next(s for s in jax.tree.leaves(state, is_leaf=is_state) if is_state(s))


@pytest.mark.slow
@EVERY
def test_a_stack_is_matrix_by_matrix(recipe):
    start, grads = normal("w", (3, 6, 4)), gradients((3, 6, 4))
    tx = recipe(0.1, LowRank(2, projector=DCT() if recipe is not ldadam else SVD()))
    stacked, _ = run(tx, start, grads)
    for i in range(3):
        alone, _ = run(tx, start[i], [g[i] for g in grads])
        np.testing.assert_allclose(stacked[i], alone, atol=20 * reordered(jnp.float32))


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_unusable_gradients_leave_no_trace(recipe, bad):
    start = {"w": normal("w", (6, 4)), "b": normal("b", (4,))}
    tx = recipe(0.1, LowRank(2))
    state, update = tx.init(start), jax.jit(tx.update)
    current = start
    for i in range(4):
        g = {"w": normal(i, (6, 4)), "b": normal(i, (4,))}
        if i in (0, 2):
            g["w"] = jnp.full_like(g["w"], bad)
        updates, state = update(g, state, current)
        current = optax.apply_updates(current, updates)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((current, state)))
    assert jnp.any(current["w"] != start["w"])


def test_error_feedback_loses_nothing():
    """What is applied and what is kept add up to the gradient and what was kept before."""
    tx = low_rank_projection(
        optax.identity(), LowRank(2, 1, projector=DCT(), residual=ErrorFeedback())
    )
    g = normal("g", (6, 4))
    state = tx.init(g)
    for _ in range(3):
        updates, after = tx.update(g, state)
        total = g + state.residual[""]
        np.testing.assert_allclose(updates + after.residual[""], total, atol=1e-5)
        state = after


def test_dct_adamw_at_full_rank_is_adam_in_the_rotated_basis():
    start, grads = normal("w", (6, 4)), gradients((6, 4))
    q = columns(4, jnp.arange(4), "dct3", jnp.float32)
    got, _ = run(dct_adamw(0.1, LowRank(4), eps=1e-8), start, grads)
    expected, _ = run(optax.adam(0.1), start @ q, [g @ q for g in grads])
    np.testing.assert_allclose(got, expected @ q.T, atol=1e-4)


def test_trion_at_full_rank_orthogonalises_the_momentum():
    start, grads = normal("w", (6, 4)), gradients((6, 4), 2)
    got, state = run(trion(0.1, LowRank(4), momentum=0.5, scaling="none"), start, grads)
    momentum = jnp.zeros_like(start)
    expected = start
    for g in grads:
        momentum = momentum + g
        expected = expected - 0.1 * newton_schulz(momentum)
        momentum = 0.5 * momentum
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(projected(state).residual[""], momentum, atol=1e-5)


@pytest.mark.parametrize(
    "scaling, factor", [("kj", 1.5**0.5), ("kimi", 0.2 * 6**0.5), ("dion", 1.5**0.5), ("none", 1)]
)
def test_trion_scales_by_shape(scaling, factor):
    g = normal("g", (6, 4))
    tx, plain = (trion(1.0, LowRank(2), scaling=s) for s in (scaling, "none"))
    got, expected = (t.update(g, t.init(g), g)[0] for t in (tx, plain))
    np.testing.assert_allclose(got, factor * expected, rtol=1e-5)
    flipped = LowRank(2, axes=Axes(rows=-1, cols=-2), projector=DCT())
    tx, plain = (trion(1.0, flipped, scaling=s) for s in ("kj", "none"))
    got, expected = (t.update(g, t.init(g), g)[0] for t in (tx, plain))
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # 4 outputs of 6 inputs


def test_trion_trains_the_other_leaves_by_adam():
    start = {"w": normal("w", (6, 4)), "embed": normal("e", (5, 4)), "b": jnp.zeros(4)}
    tx = trion(0.1, rules(("embed", None), default=LowRank(2)), adam_learning_rate=0.01)
    got, _ = run(tx, start, [start])
    np.testing.assert_allclose(got["embed"], start["embed"] - 0.01 * jnp.sign(start["embed"]), 1e-5)


def test_ldadam_does_not_depend_on_the_signs_of_its_bases():
    start, grads = normal("w", (6, 4)), gradients((6, 4), 6)
    tx = scale_by_ldadam(LowRank(2))
    update = jax.jit(tx.update)

    def trajectory(flip):
        state, out = tx.init(start), []
        for g in grads:
            updates, state = update(g, state)
            out.append(updates)
            signs = jnp.array([1.0, -1.0 if flip else 1.0])
            state = state._replace(
                bases={"": state.bases[""] * signs[:, None]}, mu={"": state.mu[""] * signs[:, None]}
            )
        return jnp.stack(out)

    np.testing.assert_allclose(trajectory(True), trajectory(False), atol=1e-5)


def test_ldadam_keeps_what_it_leaves_out():
    """Without momentum the buffer is the rest of the projection."""
    g = normal("g", (6, 4))
    tx = scale_by_ldadam(LowRank(2), b1=0.0)
    _, state = tx.update(g, tx.init(g))
    p = state.bases[""]
    np.testing.assert_allclose(p @ p.T, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(state.error[""], g - g @ p.T @ p, atol=1e-6)
    assert scale_by_ldadam(LowRank(2), error_feedback=False).init(g).error == {}


def test_ldadam_on_plain_leaves_is_adam():
    start, grads = {"w": normal("w", (6, 4)), "b": jnp.ones(4)}, gradients((4,))
    grads = [{"w": normal("w", (6, 4)), "b": g} for g in grads]
    got, _ = run(ldadam(0.1, LowRank(2), b1=0.9, b2=0.99), start, grads)
    expected, _ = run(optax.adam(0.1, b1=0.9, b2=0.99), start["b"], [g["b"] for g in grads])
    np.testing.assert_allclose(got["b"], expected, rtol=1e-5)


def test_ldadam_follows_the_gradient():
    """After the gradient has moved to another subspace, the basis moves there as well."""
    first, second = (jnp.outer(normal(i, (6,)), normal(i + 5, (4,))) for i in range(2))
    tx = scale_by_ldadam(LowRank(1), error_feedback=False)
    state, update = tx.init(first), jax.jit(tx.update)
    for g in [first] * 3 + [second] * 60:
        _, state = update(g, state)
    assert jnp.linalg.norm(second @ state.bases[""].T) > 0.99 * jnp.linalg.norm(second)


@pytest.mark.parametrize(
    "spec, message",
    [
        (LowRank(2, period=10), "moves its subspace at every step, but the LowRank has period=10"),
        (LowRank(2, residual=Drop()), "LDAdam prescribes its residual"),
        (LowRank(2, refresh=Periodic()), "LDAdam prescribes its refresh"),
        (LowRank(2, projector=SVD(), transport=Align()), "LDAdam prescribes its transport"),
        (LowRank(2, projector=TwoSided()), "LDAdam needs a projector with one matrix"),
    ],
)
def test_ldadam_says_what_it_prescribes(spec, message):
    with pytest.raises(ValueError, match=message):
        ldadam(0.1, rules(("b", None), default=spec))
    ldadam(0.1, LowRank(2, period=1, projector=SubspaceIteration(iterations=2)))


def test_grad_norm_lorp_changes_lengths_by_the_magnitude_alone():
    start = {"w": normal("w", (6, 4)), "b": normal("b", (4,))}
    tx = grad_norm_lorp(0.1, LowRank(2), weight_decay=0.5)
    _, state = run(tx, start, [start])
    assert state.inner_state.direction[0].inner.mu["w"].shape == (2, 6)
    assert state.inner_state.magnitude[0].mu["w"].shape == (6,)
    radial = {"w": start["w"], "b": jnp.zeros(4)}
    updates, _ = tx.update(radial, tx.init(start), start)
    lengths = jnp.linalg.norm(start["w"] + updates["w"], axis=-1)
    # Adam's first step, then decay: of the magnitudes, and of what is not normalised.
    expected = (jnp.linalg.norm(start["w"], axis=-1) - 0.1) * 0.95
    np.testing.assert_allclose(lengths, expected, rtol=1e-3)
    np.testing.assert_allclose(updates["b"], -0.05 * start["b"], rtol=1e-5)


def test_grad_norm_lorp_on_kernels_of_inputs_and_outputs():
    start, grads = normal("w", (6, 4)), gradients((6, 4))
    spec = LowRank(2, projector=SVD())
    expected, _ = run(grad_norm_lorp(0.1, spec), start, grads)
    flipped = LowRank(2, axes=Axes(rows=-1, cols=-2), projector=SVD())
    got, _ = run(grad_norm_lorp(0.1, flipped), start.T, [g.T for g in grads])
    np.testing.assert_allclose(got.T, expected, atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (functools.partial(trion, scaling="muon"), "scaling must be one of kj, kimi, dion, none"),
        (functools.partial(trion, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (functools.partial(grad_norm_lorp, mode="released"), "mode must be one of weight_norm"),
        (functools.partial(ldadam, rho=-1.0), r"rho must be in \[0, 1\)"),
        (functools.partial(dct_adamw, weight_decay=-1.0), "weight_decay must be a finite number"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(0.1, LowRank(2))


def test_accumulation_in_the_low_rank_space():
    """Between refits projecting the mean is the mean of projections."""
    start, grads = normal("w", (6, 4)), gradients((6, 4))
    spec = LowRank(2, period=4, projector=SVD())
    inside = low_rank_projection(accumulate(debiased_adam(), 2), spec)
    state, update = inside.init(start), jax.jit(inside.update)
    out = []
    for g in grads:
        updates, state = update(g, state)
        out.append(updates)
    assert state.inner.total[""].shape == (2, 6)
    p = jnp.linalg.svd(grads[0].T, full_matrices=False)[0][:, :2]
    low = [p.T @ g.T for g in grads]
    adam = optax.scale_by_adam()
    adam_state = adam.init(low[0])
    for i in (0, 2):
        np.testing.assert_array_equal(out[i], 0.0)
        expected, adam_state = adam.update((low[i] + low[i + 1]) / 2, adam_state)
        np.testing.assert_allclose(out[i + 1], (p @ expected).T, atol=1e-4)
