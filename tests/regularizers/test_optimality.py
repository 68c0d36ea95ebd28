"""Minimisers that lead elsewhere than to zero, judged by 0 in m (w - u) + tau dpsi(w)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from regularizers.cases import problem
from tolerances import rounding

from optax_structured import regularizers as r

pytestmark = pytest.mark.usefixtures("x64")
EXACT = 10 * rounding("float64")
seeds = st.integers(0, 10**6)
strengths = st.floats(-3, 3).map(lambda x: 10**x)
spreads = st.sampled_from([0.0, 2.0, 6.0])
quick = settings(max_examples=30, deadline=None)


@functools.partial(jax.jit, static_argnums=0)
def prox(regularizer, u, metric, strength):
    return regularizer.prox(u, metric, strength)


@given(seeds, strengths, spreads)
@quick
def test_total_variation(seed, strength, spread):
    """What each entry is pulled by adds up, along a line, to the strength at each jump."""
    u, metric = problem(seed, rows=12, spread=spread)
    w = np.asarray(prox(r.TotalVariation(axis=0), u, metric, strength))
    held = np.cumsum(metric * (w - u), axis=0)
    jump, scale = np.sign(np.diff(w, axis=0)), np.sum(np.abs(metric * u), axis=0) + strength
    assert np.all(np.abs(held[-1]) <= EXACT * scale)
    assert np.all(np.abs(held[:-1]) <= strength + EXACT * scale)
    off = np.where(jump == 0, 0, held[:-1] - strength * jump)
    assert np.all(np.abs(off) <= EXACT * scale)
    np.testing.assert_array_equal(r.TotalVariation(axis=0).support(w), jump != 0)


def test_total_variation_of_much_strength_is_the_mean():
    u, metric = problem(0)
    w = prox(r.TotalVariation(axis=1), u, metric, 1e6)
    mean = np.sum(metric * u, axis=1, keepdims=True) / np.sum(metric, axis=1, keepdims=True)
    np.testing.assert_allclose(w, np.broadcast_to(mean, u.shape), rtol=0, atol=1e-12)
    assert not np.any(np.diff(w, axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3])
def test_total_variation_of_short_lines(length):
    u = jnp.array([5.0, 1.0, 2.0])[:length]
    expected = {1: [5.0], 2: [4.0, 2.0], 3: [4.0, 2.0, 2.0]}[length]
    np.testing.assert_allclose(r.TotalVariation().prox(u, 1.0, 1.0), expected)


@given(seeds, spreads, st.sampled_from([0.01, 1.0, 100.0]))
@quick
def test_simplex(seed, spread, total):
    """One multiplier a group: what is above zero is pulled by it, and nothing by more."""
    u, metric = problem(seed, rows=12, spread=spread)
    penalty = r.Simplex(group_axis=1, total=total)
    w = np.asarray(prox(penalty, u, metric, 1.0))
    assert np.all(w >= 0)
    np.testing.assert_allclose(np.sum(w, axis=0), total, rtol=1e-12)
    assert penalty.value(w) == 0
    pull = metric * (u - w)
    most = np.max(pull, axis=0)
    scale = np.max(np.abs(metric * u), axis=0) + np.max(metric, axis=0) * total
    assert np.all(np.abs(np.where(w > 0, pull - most, 0)) <= EXACT * scale)


def test_simplex_in_the_euclidean_metric_is_the_projection():
    u, _ = problem(1)
    expected = jax.vmap(lambda x: optax.projections.projection_simplex(x, 2.0))(u)
    np.testing.assert_allclose(prox(r.Simplex(0, total=2.0), u, 1.0, 0.3), expected, atol=1e-12)


def test_simplex_of_stacked_layers():
    u = problem(2, rows=4, columns=6)[0].reshape(2, 2, 6)
    stacked = prox(r.Simplex(-2, batch_axis=0), u, 1.0, 1.0)
    each = np.stack([prox(r.Simplex(-2), layer, 1.0, 1.0) for layer in u])
    np.testing.assert_array_equal(stacked, each)
    assert r.Simplex(0).value(each[0]) == 0 and r.Simplex(0).value(2 * each[0]) == np.inf


def test_distance_to_sign_ends_exactly_binary():
    u = jnp.array([-3.0, -1.25, -0.8, -1e-9, 0.0, 1e-9, 0.8, 1.25, 3.0])
    w = r.DistanceToSign().prox(u, 1.0, 0.5)
    np.testing.assert_array_equal(w == jnp.sign(w), np.abs(np.abs(u) - 1) <= 0.5)
    np.testing.assert_array_equal(r.DistanceToSign().support(w), jnp.abs(w) != 1)
    assert w[4] == 0.5 and r.DistanceToSign(keep_zeros=True).prox(u, 1.0, 0.5)[4] == 0.0
    everywhere = r.DistanceToSign().prox(u, 1.0, 10.0)
    np.testing.assert_array_equal(everywhere, jnp.where(u < 0, -1.0, 1.0))


def test_leaves_that_cannot_take_it():
    with pytest.raises(ValueError, match="needs two entries or more along axis 1"):
        r.TotalVariation().check((3, 1))
    with pytest.raises(ValueError, match="axis=2: axis 2 is out of range"):
        r.TotalVariation(2).check((3, 4))
    with pytest.raises(TypeError, match="axis must be an int"):
        r.TotalVariation("rows")
    with pytest.raises(ValueError, match="total must be a finite number above 0"):
        r.Simplex(0, total=0.0)
