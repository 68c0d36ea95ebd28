"""What a prox must do, over the whole table: optimal, stable, exactly zero, never NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from regularizers.cases import CONVEX, EVERY, GROUPED_FOLDED, NORMS, PENALTIES, SPARSE, problem
from tolerances import assert_close, rounding

from optax_structured import regularizers as r
from optax_structured.regularizers.base import dual_norm, piece_size
from optax_structured.regularizers.group import ShrunkGroups
from optax_structured.regularizers.proximal_gradient import certainly_zero

every = pytest.mark.parametrize("regularizer", EVERY, ids=repr)
convex = pytest.mark.parametrize("regularizer", CONVEX, ids=repr)
norms = pytest.mark.parametrize("regularizer", NORMS, ids=repr)
penalties = pytest.mark.parametrize("regularizer", PENALTIES, ids=repr)
quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10**6)
strengths = st.floats(-2, 1).map(lambda x: 10**x)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnums=0)
def prox(regularizer, u, metric, strength):
    return regularizer.prox(u, metric, strength)


@functools.partial(jax.jit, static_argnums=0)
def optimality(regularizer, u, metric, w):
    residual = metric * (u - w)
    return regularizer.dual_norm(residual), jnp.vdot(residual, w), regularizer.value(w)


@pytest.mark.slow
@norms
@given(seeds, strengths, st.sampled_from([0.0, 2.0, 8.0]))
@quick
def test_optimality_and_moreau_decomposition(regularizer, seed, strength, spread):
    """m(u - w) lies in the dual ball of radius tau and supports it at w: for m = 1, Moreau."""
    u, metric = problem(seed, spread=spread)
    w = prox(regularizer, u, metric, strength)
    dual, inner, value = optimality(regularizer, u, metric, w)
    assert dual <= strength * (1 + 1e-8)
    np.testing.assert_allclose(inner, strength * value, rtol=1e-8, atol=1e-12)


@convex
@given(seeds, strengths)
@quick
def test_convex_prox_is_nonexpansive_in_the_metric(regularizer, seed, strength):
    u, metric = problem(seed)
    v, _ = problem(seed + 1)
    gap = prox(regularizer, u, metric, strength) - prox(regularizer, v, metric, strength)
    assert np.sum(metric * gap**2) <= np.sum(metric * (u - v) ** 2) * (1 + rounding(u.dtype))


@every
@given(seeds, strengths)
@quick
def test_metric_and_strength_scale_together(regularizer, seed, strength):
    u, metric = problem(seed)
    w = prox(regularizer, u, metric, strength)
    # A power of two, so that no entry on the edge of its threshold changes sides.
    assert_close(prox(regularizer, u, 64 * metric, 64 * strength), w, 1e-9)


@norms
@given(seeds, strengths)
@quick
def test_norms_are_homogeneous(regularizer, seed, strength):
    u, metric = problem(seed)
    w = prox(regularizer, u, metric, strength)
    assert_close(prox(regularizer, 8 * u, metric, 8 * strength), 8 * w, 1e-9)
    value = regularizer.value(u)
    np.testing.assert_allclose(regularizer.value(-3 * u), 3 * value, rtol=rounding(u.dtype))


@penalties
def test_zero_stays_and_zero_strength_moves_nothing(regularizer):
    u, metric = problem(0)
    assert np.all(prox(regularizer, 0 * u, metric, 0.3) == 0)
    assert np.all(prox(regularizer, 0 * u, metric, 0.0) == 0)
    assert_close(prox(regularizer, u, metric, 0.0), u, rounding(u.dtype))
    assert regularizer.value(0 * u) == 0


@every
@given(seeds, strengths)
@quick
def test_a_metric_that_is_a_number_is_one_of_equal_entries(regularizer, seed, strength):
    u, _ = problem(seed)
    scalar = prox(regularizer, u, 0.7, strength)
    assert_close(prox(regularizer, u, np.full_like(u, 0.7), strength), scalar, 1e-9)


@pytest.mark.parametrize("regularizer", SPARSE, ids=repr)
@given(seeds, strengths)
@quick
def test_support_counts_pieces_and_screening_drops_dead_groups_only(regularizer, seed, strength):
    u, metric = problem(seed)
    w = prox(regularizer, u, metric, strength)
    support = regularizer.support(w)
    assert support.size * piece_size(regularizer, w.shape) == w.size
    dropped = certainly_zero(regularizer, metric * u, strength)
    if isinstance(regularizer, ShrunkGroups):
        np.testing.assert_array_equal(np.squeeze(dropped, 0), ~support)
    else:
        assert not np.any(dropped)


@norms
def test_dual_norm_is_the_smallest_strength_that_keeps_zero(regularizer):
    u, metric = problem(3)
    limit = regularizer.dual_norm(metric * u)
    assert np.all(prox(regularizer, u, metric, limit * (1 + 1e-12)) == 0)
    assert np.any(prox(regularizer, u, metric, limit * (1 - 1e-6)) != 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@penalties
def test_extremes_are_exact_zeros_and_never_nan(regularizer, dtype):
    u = jnp.array([[0, 1e-8, -1, 1e7], [0, -1e-8, 1, 0]], dtype)
    metric, strength = jnp.full(u.shape, 1e-8, dtype), jnp.asarray(1e8, dtype)
    runs = [
        regularizer.prox(u, metric, strength),
        prox(regularizer, u, metric, strength),
        jax.vmap(regularizer.prox, (0, 0, None))(u[None], metric[None], strength)[0],
        regularizer.prox(u, 1e-8, 1e8),
    ]
    for w in runs:
        assert w.dtype == jnp.float32
        assert np.all(np.asarray(w) == 0.0)
    mixed = metric.at[0].set(1e8)
    for strength in (0.0, 1e-8, 1.0, 1e8):
        w = prox(regularizer, u, mixed, jnp.asarray(strength, dtype))
        assert np.all(np.isfinite(w)) and np.all(np.asarray(w)[:, 0] == 0)
        assert np.isfinite(regularizer.value(w))


@pytest.mark.slow
@every
def test_float32_agrees_with_float64(regularizer):
    u, metric = problem(5, rows=30, columns=60)
    exact = prox(regularizer, u, metric, 0.3)
    single = prox(regularizer, u.astype(np.float32), metric.astype(np.float32), np.float32(0.3))
    assert exact.dtype == jnp.float64 and single.dtype == jnp.float32
    assert_close(single, exact, rounding(np.float32))


@pytest.mark.slow
@every
def test_gradients_are_finite_at_dead_groups_and_zero_entries(regularizer):
    u, metric = problem(0)

    def loss(u, metric, strength):
        return jnp.sum(jnp.square(regularizer.prox(u, metric, strength)))

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(u, jnp.asarray(metric), 0.3):
        assert np.all(np.isfinite(gradient))
    assert np.all(np.isfinite(jax.grad(regularizer.value)(u)))


@pytest.mark.slow
@convex
def test_gradient_matches_finite_differences(regularizer):
    u, metric = problem(2)

    @jax.jit
    def loss(strength):
        return jnp.sum(jnp.square(regularizer.prox(u, metric, strength)))

    step = 1e-6
    numeric = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(0.3), numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@every
def test_vmap_over_layers_and_strengths(regularizer):
    layers = [problem(seed) for seed in range(3)]
    u, metric = (np.stack(x) for x in zip(*layers, strict=True))
    strength = jnp.array([0.1, 0.3, 1.0])
    batched = jax.vmap(regularizer.prox)(u, metric, strength)
    each = [prox(regularizer, *layer, s) for layer, s in zip(layers, strength, strict=True)]
    assert_close(batched, np.stack(each), 1e-9)


@pytest.mark.slow
@every
def test_empty_leaves_pass_through(regularizer):
    u = jnp.zeros((0, 4))
    assert regularizer.prox(u, u + 1, 0.1).shape == u.shape
    assert regularizer.value(u) == 0
    assert regularizer.prox(u.T, u.T + 1, 0.1).shape == u.T.shape


@pytest.mark.slow
@every
def test_nan_is_not_hidden(regularizer):
    u, metric = problem(0)
    u[2, 3] = np.nan
    assert np.isnan(prox(regularizer, u, metric, 0.1)[2, 3])


@every
def test_a_config_is_frozen_hashable_and_not_callable(regularizer):
    assert hash(regularizer) == hash(dataclasses.replace(regularizer))
    assert not callable(regularizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        regularizer.weight = 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r.ElasticNet(l2=0.0), r.L1()),
        (r.NonNegative(), r.Box(0.0, float("inf"))),
        (r.SparseGroupLasso(1, l1_ratio=0.0), r.GroupLasso(1)),
        (r.NonNegativeGroupLasso((0, 1)), r.Box(0.0, float("inf"), penalty=r.L1())),
        (r.GroupLasso((0, 1)), r.L1()),
        (r.GroupL0((0, 1)), r.L0()),
        (r.GroupMCP((0, 1), threshold=0.5), r.MCP(0.5)),
        (r.MCP(1.0, gamma=1e14), r.L1()),
        (r.SCAD(1.0, a=1e14), r.L1()),
        (r.GroupMCP(1, gamma=1e14), r.GroupLasso(1)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("seed", range(5))
def test_limiting_cases(one, other, seed):
    u, metric = problem(seed)
    for strength in (0.03, 0.3, 3.0):
        w = prox(other, u, metric, strength)
        assert_close(prox(one, u, metric, strength), w, 1e-9)
        np.testing.assert_allclose(one.value(w), other.value(w), rtol=1e-9)


@pytest.mark.parametrize("regularizer", [r.L0(), r.ElasticNet(), *GROUPED_FOLDED], ids=repr)
def test_no_dual_norm_without_a_norm(regularizer):
    with pytest.raises(TypeError, match="not a norm"):
        dual_norm(regularizer, jnp.ones((2, 2)))
