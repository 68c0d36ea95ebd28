"""Batch normalisation of positive definite matrices: the published layer, with exact gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import GOLDEN

from optax_structured.contrib.layers import (
    SPDBatchNormParams,
    SPDStatistics,
    bures_wasserstein_distance,
    bures_wasserstein_exp,
    bures_wasserstein_geodesic,
    bures_wasserstein_mean_step,
    init_spd_batch_norm,
    spd_batch_norm,
    spd_descent,
    spd_power,
    spectral_product,
)


def matrices(seed=0, count=6, size=3, spread=1.0):
    a = spread * jax.random.normal(jax.random.key(seed), (count, size, size))
    return jnp.eye(size) + a @ a.transpose(0, 2, 1) / size


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("gbw_batch_norm-"))
def test_golden(name):
    golden = load(name)
    meta, arrays = golden.meta, {k: jnp.asarray(x) for k, x in golden.arrays.items()}
    params = SPDBatchNormParams(
        arrays["params0/weight"], arrays["params0/M"], arrays["params0/shift"][0]
    )
    state = SPDStatistics(arrays["state0/running_mean"], arrays["state0/running_var"][0])
    how = {"power": meta["po"], "momentum": meta["momentum"], "eps": meta["eps"]}

    @jax.jit
    def layer(params, state, x):
        return spd_batch_norm(params, state, x, training=True, **how)

    batches = arrays["inputs/X"]
    for step, x in enumerate(batches):
        before, (y, state) = state, layer(params, state, x)
        want = {key: arrays[f"outputs/{key}"][step] for key in ("train_Y", "running_mean")}
        np.testing.assert_allclose(y, want["train_Y"], atol=GOLDEN)
        np.testing.assert_allclose(state.mean, want["running_mean"], atol=GOLDEN)
        np.testing.assert_allclose(
            state.variance, arrays["outputs/running_var"][step][0], rtol=GOLDEN
        )

    def total(params, x):
        return jnp.sum(arrays["inputs/cotangent"] * layer(params, before, x)[0])

    slope, slope_x = jax.jit(jax.grad(total, argnums=(0, 1)))(params, batches[-1])
    ours = {"X": slope_x, "weight": slope.bias, "M": slope.metric, "shift": slope.scale[None]}
    for key, got in ours.items():
        got = got if key == "shift" else (got + jnp.swapaxes(got, -1, -2)) / 2
        want = arrays[f"outputs/grad_exact/{key}"]
        np.testing.assert_allclose(got, want, atol=GOLDEN * np.abs(want).max(), err_msg=key)
    y, after = spd_batch_norm(params, state, batches[0], training=False, **how)
    np.testing.assert_allclose(y, arrays["outputs/eval_Y0"], atol=GOLDEN)
    assert after is state


@pytest.mark.slow
def test_identity_where_the_bias_is_the_mean(x64):
    x = matrices(spread=0.3).astype(jnp.float64)
    distance = jnp.mean(bures_wasserstein_distance(x, jnp.eye(3)))
    mean = bures_wasserstein_mean_step(x)
    params = SPDBatchNormParams(mean, jnp.eye(3), jnp.sqrt(distance + 1e-5))
    y, _ = spd_batch_norm(params, init_spd_batch_norm(3, jnp.float64)[1], x, training=True)
    np.testing.assert_allclose(y, x, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, -0.5, 2.0, 3.0, 0.3])
def test_powers_have_the_right_derivatives_at_equal_eigenvalues(exponent, x64):
    """A + t E against differences, at the identity, at two equal and at nearly equal ones."""
    direction = jnp.array([[1.0, 2.0, 0.5], [2.0, -1.0, 0.3], [0.5, 0.3, 0.7]])
    for values in ([1.0, 1.0, 1.0], [2.0, 2.0, 5.0], [1.0, 1.0 + 1e-9, 1e4]):
        a = jnp.diag(jnp.array(values))
        _, got = jax.jvp(lambda a: spd_power(a, exponent), (a,), (direction,))
        h = 1e-5
        want = (spd_power(a + h * direction, exponent) - spd_power(a - h * direction, exponent)) / (
            2 * h
        )
        np.testing.assert_allclose(got, want, atol=1e-7 * jnp.abs(want).max())


@pytest.mark.parametrize("kind", ["transport", "lyapunov"])
def test_products_have_the_right_derivatives_at_equal_eigenvalues(kind, x64):
    w, e = matrices(1, 2).astype(jnp.float64)
    for a in (jnp.eye(3), jnp.diag(jnp.array([2.0, 2.0, 7.0]))):
        _, got = jax.jvp(lambda a: spectral_product(kind, a, w), (a,), (e,))
        h = 1e-5
        want = (spectral_product(kind, a + h * e, w) - spectral_product(kind, a - h * e, w)) / (
            2 * h
        )
        np.testing.assert_allclose(got, want, atol=1e-8)
    solved = spectral_product("lyapunov", e, w)
    np.testing.assert_allclose(e @ solved + solved @ e, w, atol=1e-12)


@pytest.mark.slow
def test_float32_gradients_at_the_start_are_finite():
    """M = G = I, where derivatives of eigh are NaN; batches of one, the identity or not."""
    params, state = init_spd_batch_norm(3)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slopes(params, x):
        y, _ = spd_batch_norm(params, state, x, training=True, power=0.5)
        return jnp.sum(jnp.sin(y))

    for x in (matrices(count=1), jnp.eye(3)[None]):
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(slopes(params, x)))


def test_distances_and_geodesics():
    p, q, r = matrices(2, 3)
    distance = lambda *pair: bures_wasserstein_distance(*pair) ** 0.5  # noqa: E731
    np.testing.assert_allclose(distance(p, q), distance(q, p), rtol=1e-4)
    assert distance(p, r) <= distance(p, q) + distance(q, r)
    assert abs(bures_wasserstein_distance(p, p)) < 1e-5
    np.testing.assert_allclose(bures_wasserstein_geodesic(p, q, 0.0), p, atol=1e-5)
    np.testing.assert_allclose(bures_wasserstein_geodesic(p, q, 1.0), q, atol=1e-5)
    half = bures_wasserstein_geodesic(p, q, 0.5)
    np.testing.assert_allclose(distance(p, half), distance(p, q) / 2, rtol=1e-3)
    moved = bures_wasserstein_exp(p, 0.1 * r)
    np.testing.assert_allclose(
        bures_wasserstein_distance(p, moved),
        0.5 * jnp.vdot(spectral_product("lyapunov", p, 0.1 * r), 0.1 * r),
        rtol=2e-2,
    )


def test_variance_about_the_mean_is_smaller():
    x, (params, state) = matrices(spread=2.0), init_spd_batch_norm(3)
    about = {
        which: spd_batch_norm(params, state, x, training=True, variance_about=which)[1].variance
        for which in ("identity", "mean")
    }
    assert about["mean"] < about["identity"]


def test_descent_stays_positive_definite_and_goes_down():
    target = matrices(5, 1)[0]
    loss = lambda p: jnp.sum((p - target) ** 2)  # noqa: E731
    optimizer = optax.inject_hyperparams(spd_descent)(0.02)
    p = jnp.eye(3)
    state = optimizer.init(p)
    for _ in range(60):
        updates, state = optimizer.update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
        assert jnp.linalg.eigvalsh(p).min() > 0
    assert loss(p) < 1e-2 * loss(jnp.eye(3))


def test_mistakes_say_what_to_do():
    params, state = init_spd_batch_norm(3)
    with pytest.raises(ValueError, match="the d of its parameters, 3, got"):
        spd_batch_norm(params, state, jnp.eye(2), training=True)
    with pytest.raises(ValueError, match="variance_about must be 'identity' or 'mean'"):
        spd_batch_norm(params, state, jnp.eye(3), training=True, variance_about="median")
    with pytest.raises(ValueError, match="kind must be one of transport, lyapunov"):
        spectral_product("sum", jnp.eye(2), jnp.eye(2))
    with pytest.raises(ValueError, match="spd_descent needs the parameters"):
        spd_descent(0.1).update(jnp.eye(2), spd_descent(0.1).init(jnp.eye(2)))
