"""Structure metrics against their definitions, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import reordered, rounding

import optax_structured as oxs
from optax_structured import diagnostics as dx

GROUPS = oxs.GroupLasso(group_axis=-2)


@pytest.fixture
def params():
    kernel = (
        jnp.ones((3, 3, 4, 5)).at[:, :, 1].set(0.0).at[:, :, 2].set(0.0).at[0, 0, 0, 0].set(0.0)
    )
    dense = jnp.ones((6, 2)).at[0].set(0.0).at[1, 0].set(0.0)
    return {"conv": {"kernel": kernel, "bias": jnp.zeros(5)}, "dense": {"kernel": dense}}


def test_counts_by_hand(params):
    zeros, entries = (2 * 45 + 1) + 5 + 3, 180 + 5 + 12
    np.testing.assert_allclose(dx.unstructured_sparsity(params), zeros / entries, rtol=1e-6)
    np.testing.assert_allclose(dx.structured_sparsity(params, GROUPS), 3 / 10, rtol=1e-6)
    np.testing.assert_allclose(dx.weighted_sparsity(params, GROUPS), 92 / 192, rtol=1e-6)


def test_tiny_is_not_zero():
    tree = {"kernel": jnp.full((3, 4), 1e-37)}
    assert dx.unstructured_sparsity(tree) == dx.structured_sparsity(tree, GROUPS) == 0


def test_nothing_regularised_is_zero_not_nan(params):
    for measure in (dx.structured_sparsity, dx.weighted_sparsity, dx.low_rank_level):
        assert measure(params, None) == 0
        assert measure({}, GROUPS) == 0
    assert dx.unstructured_sparsity({}) == 0
    assert dx.strength_max(params, None) == 0


def test_low_rank_level_counts_singular_values_of_nuclear_leaves_only():
    low = jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0))
    params = {"low": low, "full": jnp.eye(3), "other": jnp.zeros((5, 5))}
    table = oxs.rules(("other", GROUPS), default=oxs.NuclearNorm())
    np.testing.assert_allclose(dx.low_rank_level(params, table), 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(dx.weighted_sparsity(params, table), 1.0)


def test_layer_rows_and_supports(params):
    rows = {row.path: row for row in dx.layer_rows(params, GROUPS, gradient=params)}
    assert list(rows) == ["conv/bias", "conv/kernel", "dense/kernel"]
    conv = rows["conv/kernel"]
    assert (conv.pieces, int(conv.alive), conv.piece_size) == (4, 2, 45)
    np.testing.assert_allclose(conv.strength_max, 1.0, rtol=1e-6)
    assert rows["conv/bias"].regularizer is None and rows["conv/bias"].pieces == 5
    alive = dx.supports(params, GROUPS)
    np.testing.assert_array_equal(alive["conv/kernel"], [True, False, False, True])
    assert "conv/bias" not in alive


def test_objective_and_strength_max(params):
    value = dx.objective(2.0, params, GROUPS, 0.5)
    norms = np.sqrt(44) + np.sqrt(45), 1 + 4 * np.sqrt(2)
    expected = 2 + 0.5 * (np.sqrt(45) * norms[0] + np.sqrt(2) * norms[1])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dx.strength_max(params, GROUPS), 1.0, rtol=1e-6)


@pytest.mark.slow
def test_everything_runs_under_jit(params):
    def everything(w):
        return (
            dx.unstructured_sparsity(w),
            dx.weighted_sparsity(w, GROUPS),
            dx.structured_sparsity(w, GROUPS),
            dx.stationarity(w, w, GROUPS, 0.1),
            dx.supports(w, GROUPS),
            dx.layer_rows(w, GROUPS, gradient=w),
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=reordered(np.float32)),
        jax.jit(everything)(params),
        everything(params),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "strength"), [(oxs.L1(), 0.8), (oxs.GroupLasso(-2), 0.8), (oxs.NuclearNorm(), 1.5)]
)
def test_stationarity_vanishes_at_a_minimum_and_only_there(spec, strength):
    """The prox of u is where the gradient w - u and a subgradient cancel."""
    u = jax.random.normal(jax.random.key(0), (6, 5))
    w = spec.prox(u, 1.0, strength)
    assert 0 < jnp.count_nonzero(spec.support(w)) < spec.support(w).size
    assert dx.stationarity(w, w - u, spec, strength) < 10 * rounding(w.dtype)
    assert dx.stationarity(w, 1.1 * (w - u), spec, strength) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("spec", [oxs.L1(), oxs.GroupLasso(-2), oxs.NuclearNorm()])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_stationarity_is_the_least_norm_of_a_subgradient(spec, strength, x64):
    """Which is the slope of the steepest proximal descent: (w - prox(w - t G)) / t for small t."""
    keys = jax.random.split(jax.random.key(1), 2)
    w = spec.prox(jax.random.normal(keys[0], (6, 5), jnp.float64), 1.0, 1.2)
    gradient, t = jax.random.normal(keys[1], (6, 5), jnp.float64), 1e-7
    slope = (w - spec.prox(w - t * gradient, 1.0, t * strength)) / t
    found = dx.stationarity(w, gradient, spec, strength)
    np.testing.assert_allclose(found, jnp.linalg.norm(slope), rtol=1e-5)


def test_plain_leaves_add_their_gradient_and_others_are_refused():
    w, gradient = {"bias": jnp.ones(2)}, {"bias": jnp.array([3.0, 4.0])}
    assert dx.stationarity(w, gradient, None, 1.0) == 5
    with pytest.raises(NotImplementedError, match="GroupLasso, L1 and NuclearNorm, not of MCP"):
        dx.stationarity(w, gradient, oxs.MCP(), 1.0)


@pytest.mark.slow
def test_a_network_dies_above_the_smallest_dual_norm_of_a_layer():
    """Far below `strength_max`, the largest: once a layer is gone no other has a gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (64, 8))
    target = jnp.tanh(x @ jax.random.normal(keys[1], (8, 3)))
    params = {
        "first": 0.3 * jax.random.normal(keys[2], (8, 16)),
        "last": 2.0 * jax.random.normal(keys[3], (16, 3)),
    }
    penalty = oxs.GroupLasso(group_axis=-2)

    def loss(p):
        return jnp.mean(jnp.square(0.1 * jnp.tanh(x @ p["first"]) @ p["last"] - target))

    gradient = jax.grad(loss)(params)
    held = [float(row.strength_max) for row in dx.layer_rows(params, penalty, gradient)]
    assert dx.strength_max(gradient, penalty) == max(held) > 2 * min(held)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert dx.strength_max(jax.grad(loss)(zeros), penalty) == 0  # zero stays at any

    @jax.jit
    def left(strength):
        optimizer = oxs.prox_sgd(0.3, penalty, strength)

        def step(carry, _):
            p, state = carry
            updates, state = optimizer.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3000)
        return sum(jnp.sum(alive) for alive in dx.supports(trained, penalty).values())

    assert left(1.2 * min(held)) == 0 < left(0.1 * min(held))


def test_strengths_of_the_newer_penalties():
    gradient = jnp.array([[-3.0, 4.0], [0.3, -0.4]])
    one_sided = oxs.NonNegativeGroupLasso(group_axis=0, weight=1.0)
    ceiling = dx.strength_max(gradient, one_sided)
    assert ceiling == 3.0  # the steepest descent within w >= 0
    for strength, alive in ((3.01, False), (2.99, True)):
        point = one_sided.prox(-gradient, 1.0, strength)
        assert bool(jnp.any(point != 0)) == alive
    for constraint in (oxs.Box(), oxs.NonNegative(), oxs.Simplex(group_axis=0)):
        assert dx.strength_max(gradient, constraint) == 0
    for penalty in (oxs.L0(), oxs.TotalVariation(), oxs.DistanceToSign(), oxs.MCP()):
        with pytest.raises(ValueError, match=r"'kernel': .* has no dual norm.*TargetSparsity"):
            dx.strength_max({"kernel": gradient}, penalty)
        (row,) = dx.layer_rows({"kernel": gradient}, penalty, {"kernel": gradient})
        assert row.strength_max is None
    path = dx.strength_path(gradient, oxs.L1(), number=4, smallest=1e-3)
    np.testing.assert_allclose(path, [4.0, 0.4, 0.04, 0.004], rtol=1e-5)
