"""The limiter: its inequality, and the traps of published code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import rounding

from optax_structured.transforms import limit, norm_growth_limiter

GROWTH, EPS = 1.01, 1e-8


LIMITER = norm_growth_limiter(GROWTH, EPS)


@functools.cache
def jitted(update):
    return jax.jit(update)


def norms_after(limiter, norms):
    """The norms that come out, for updates with the given norms."""
    update = jitted(limiter.update)
    state = limiter.init({"w": jnp.zeros(4)})
    out = []
    for norm in norms:
        limited, state = update({"w": jnp.full(4, norm / 2)}, state)
        out.append(float(jnp.linalg.norm(limited["w"])))
    return np.asarray(out)


@given(st.lists(st.floats(0.0, 1e6, width=32), min_size=2, max_size=6))
def test_norm_grows_at_most_by_the_factor(norms):
    out = norms_after(LIMITER, norms)
    assert np.all(out <= np.asarray(norms) * (1 + 1e-6))
    positive = out[out > 0]
    allowed = GROWTH * (positive[:-1] + EPS) * (1 + rounding(jnp.float32))
    assert np.all(positive[1:] <= allowed)


def test_norms_that_shrink_or_grow_little_pass_unchanged():
    norms = [3.0, 3.02, 2.0, 0.1, 0.1005]
    np.testing.assert_allclose(norms_after(norm_growth_limiter(GROWTH), norms), norms, rtol=1e-6)


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf])
def test_a_step_without_a_norm_is_not_remembered(nothing):
    """Published code stores the zero, and caps the next norms near eps."""
    out = norms_after(norm_growth_limiter(GROWTH), [nothing, 2.0, nothing, 2.0])
    np.testing.assert_allclose(out[[1, 3]], 2.0, rtol=1e-6)


def test_an_update_whose_norm_overflows_is_stopped():
    limiter = norm_growth_limiter(GROWTH)
    state = limiter.init(jnp.zeros(2))
    _, state = limiter.update(jnp.ones(2), state)
    limited, after = limiter.update(jnp.full(2, 1e30), state)
    np.testing.assert_array_equal(limited, 0.0)
    np.testing.assert_array_equal(after.norm, state.norm)


def test_leaves_by_themselves_or_together():
    first = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    second = {"a": jnp.array([30.0]), "b": jnp.array([0.4])}
    out = {}
    for per in ("leaf", "global"):
        limiter = norm_growth_limiter(2.0, per=per)
        _, state = limiter.update(first, limiter.init(first))
        out[per], _ = limiter.update(second, state)
    np.testing.assert_allclose(out["leaf"]["a"], 6.0, rtol=1e-6)
    np.testing.assert_allclose(out["leaf"]["b"], 0.4, rtol=1e-6)
    together = float(optax.tree.norm(out["global"]))
    np.testing.assert_allclose(together, 10.0, rtol=1e-6)
    ratio = out["global"]["a"] / out["global"]["b"]
    np.testing.assert_allclose(ratio, 75.0, rtol=1e-5)


def test_each_matrix_of_a_stack(x64):
    """The published formula, on arrays of norms."""
    norms, previous = jnp.array([5.0, 2.0, 0.5]), jnp.array([2.0, 2.0, 2.0])
    published = jnp.maximum(norms / (previous + EPS), GROWTH) / GROWTH
    factor, remembered = limit(norms, previous, GROWTH, EPS)
    np.testing.assert_allclose(factor, 1 / published, rtol=rounding(jnp.float64))
    np.testing.assert_allclose(remembered, norms / published, rtol=rounding(jnp.float64))


def test_scaling_all_updates_changes_nothing_but_the_scale():
    """Powers of two, so that the comparison is exact but for eps."""
    norms = np.array([1.0, 2.0, 4.0, 0.5, 3.0])
    limiter = norm_growth_limiter(GROWTH, 1e-30)
    np.testing.assert_array_equal(
        norms_after(limiter, 1024 * norms), 1024 * norms_after(limiter, norms)
    )


def test_growth_may_follow_a_schedule():
    limiter = norm_growth_limiter(lambda count: jnp.where(count < 1, 1.0, 2.0))
    np.testing.assert_allclose(norms_after(limiter, [1.0, 8.0, 8.0]), [1.0, 2.0, 4.0], rtol=1e-6)


def test_masked_leaves_are_not_counted():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.masked(norm_growth_limiter(), {"a": True, "b": False})
    _, state = tx.update(params, tx.init(params))
    assert state.inner_state.norm.shape == (1,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"growth": 0.0}, "growth must be a finite number above 0"),
        ({"eps": -1.0}, "eps must be a finite number above 0"),
        ({"per": "matrix"}, "per must be 'leaf' or 'global', got 'matrix'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        norm_growth_limiter(**arguments)
