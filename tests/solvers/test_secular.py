"""The exact group solve against published solutions, bisection in float64, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solvers.snapshots import snapshots
from tolerances import KKT, SECULAR

from optax_structured.regularizers.secular import solve_group


def bisected(b, metric, threshold):
    """The minimiser of each column, by 200 halvings of a bracket in float64."""
    norm = np.linalg.norm(b, axis=0)
    alive = norm > threshold
    low, high = np.full_like(norm, 1e-300), np.linalg.norm(b / metric, axis=0)
    for _ in range(1000):
        theta = np.sqrt(low) * np.sqrt(high)
        above = np.sum((b / (theta * metric + threshold)) ** 2, axis=0) <= 1
        low, high = np.where(above, low, theta), np.where(above, theta, high)
    pull = threshold / np.where(alive, high, 1.0)
    return np.where(alive, b / (metric + pull), 0.0)


def random_problems(spread, dtype, seed):
    """Columns of norm 1/s for s from the threshold to far inside, in metrics of this spread."""
    rng = np.random.default_rng(seed)
    shape = (48, 64)
    log = np.log(spread)
    metric = np.exp(rng.uniform(-0.5, 0.5, shape) * log)
    w = rng.normal(size=shape)
    dead_weights = np.where(rng.random(shape) < 0.8, spread**-0.5, 1.0)
    families = [
        (w, metric),
        (metric * w, metric),
        (np.sqrt(metric) * w, metric),
        (np.exp(rng.uniform(-0.5, 0.5, shape) * log), metric),
        (dead_weights * w, dead_weights * np.exp(0.7 * rng.normal(size=shape))),
    ]
    s = np.concatenate([1 - np.logspace(-1.5, -0.3, 24), np.logspace(-8, -0.3, 24)])
    s = np.concatenate([s, np.linspace(1.01, 3.0, 16)])  # and groups that die
    for b, m in families:
        b = b / np.linalg.norm(b, axis=0) / s
        yield b.astype(dtype).astype(np.float64), m.astype(dtype).astype(np.float64)


@pytest.mark.parametrize("case", snapshots("group-lasso"))
def test_published_solutions(case, x64):
    w = np.asarray(solve_group(jnp.asarray(case["b"]), jnp.asarray(case["P"]), case["tau"], (0,)))
    expected, norm = case["W"], np.linalg.norm(case["b"], axis=0)
    distance = np.abs(1 - case["tau"] / np.maximum(norm, case["tau"]))
    on_threshold = np.abs(norm - case["tau"]) < 1e-12 * case["tau"]
    assert np.all(np.linalg.norm(w, axis=0)[on_threshold] < 1e-12)
    error = np.linalg.norm(w - expected, axis=0)[~on_threshold] * distance[~on_threshold]
    size = np.linalg.norm(expected, axis=0)[~on_threshold]
    assert np.all(error <= SECULAR["float64", 1e16] * size)
    np.testing.assert_array_equal(w[:, ~on_threshold] == 0, expected[:, ~on_threshold] == 0)


@pytest.mark.parametrize(("dtype", "spread"), SECULAR)
def test_against_bisection(dtype, spread):
    with jax.enable_x64(dtype == "float64"):
        solve = jax.jit(lambda b, m: solve_group(b, m, 1.0, (0,)))
        for b, metric in random_problems(spread, dtype, seed=0):
            w = np.asarray(solve(b.astype(dtype), metric.astype(dtype)), np.float64)
            expected = bisected(b, metric, 1.0)
            np.testing.assert_array_equal(w == 0, expected == 0)
            error = np.linalg.norm(w - expected, axis=0)
            distance = 1 - 1 / np.maximum(np.linalg.norm(b, axis=0), 1.0)
            assert np.all(
                error * distance <= SECULAR[dtype, spread] * np.linalg.norm(expected, axis=0)
            )


@pytest.mark.parametrize("spread", [1e2, 1e8])
def test_optimality(spread):
    for b, metric in random_problems(spread, "float32", seed=1):
        w = np.asarray(solve_group(jnp.float32(b), jnp.float32(metric), 1.0, (0,)), np.float64)
        norm = np.linalg.norm(w, axis=0)
        alive = norm > 0
        residual = b - metric * w - w / np.where(alive, norm, 1.0)
        size = np.linalg.norm(b, axis=0)
        assert np.all(np.linalg.norm(residual, axis=0)[alive] <= KKT * size[alive])
        assert np.all(size[~alive] <= 1)


def test_fixed_cost():
    """No while loop (a vmapped one would run to the slowest member), and no host callback."""
    jaxpr = str(jax.make_jaxpr(lambda b, m: solve_group(b, m, 1.0, (1,)))(*jnp.ones((2, 3, 4))))
    assert "while" not in jaxpr and "callback" not in jaxpr
    assert "scan" in jaxpr


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_scale_invariance(scale):
    b, metric = next(random_problems(1e2, "float32", seed=2))
    b, metric, scale = jnp.float32(b), jnp.float32(metric), jnp.float32(scale)
    plain = solve_group(b, metric, 1.0, (0,))
    scaled = solve_group(b * scale, metric * scale, scale, (0,))
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=1e-5 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize("metric", [2.0, jnp.full((2, 3), 2.0)])
def test_no_threshold_no_shrinkage(metric):
    b = jnp.array([[1.0, -2.0, 1e30], [0.0, 0.0, 0.0]])
    for threshold in (0.0, 1e-30):
        np.testing.assert_allclose(solve_group(b, metric, threshold, (1,)), b / 2, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 1e-36, 1e-30, 1e-19])
@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e-8])
def test_extreme_units_stay_finite(threshold, size):
    """As where the learning rate starts at 0: the metric is eps alone, and all but nothing else."""
    metric = np.float32(size) * np.array([[1.0, 2.0, 1.0, 4.0]] * 3, np.float32)
    w0 = np.array([[0.0] * 4, [1.0, -2.0, 0.0, 0.5], [1e-3] * 4], np.float32)
    b, threshold = metric * w0, np.float32(threshold)
    w = np.asarray(solve_group(jnp.asarray(b), jnp.asarray(metric), threshold, (1,)))
    expected = w0 if threshold == 0 else bisected(*np.float64((b.T, metric.T)), threshold).T
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-5)


def test_nan_is_not_hidden():
    w = solve_group(jnp.array([[jnp.nan, 1.0], [3.0, 4.0]]), jnp.ones((2, 2)), 1.0, (1,))
    assert np.isnan(w[0, 0]) and np.isfinite(w[1]).all()


def test_one_threshold_a_group():
    b = jnp.array([[3.0, 4.0], [3.0, 4.0]])
    w = solve_group(b, jnp.ones((2, 2)), jnp.array([[1.0], [6.0]]), (1,))
    np.testing.assert_allclose(w, [[2.4, 3.2], [0.0, 0.0]], rtol=1e-6)


@pytest.mark.slow
def test_vmap_and_gradient():
    b, metric = (jnp.float32(x) for x in next(random_problems(1e2, "float32", seed=3)))
    batch = jnp.stack([b, 2 * b])
    together = jax.vmap(lambda x: solve_group(x, metric, 1.0, (0,)))(batch)
    alone = jnp.stack([solve_group(x, metric, 1.0, (0,)) for x in batch])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-7)
    gradient = jax.grad(lambda x: jnp.sum(solve_group(x, metric, 1.0, (0,))))(b)
    assert np.isfinite(gradient).all()
