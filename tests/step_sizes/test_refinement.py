"""Refined schedules: published arrays, and what the closed form implies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import BOUND, ROUNDING

from optax_structured.step_sizes import (
    interpolated_schedule,
    last_iterate_bound,
    record_norms,
    recorded_norms,
    refined_schedule,
)
from optax_structured.step_sizes.refinement import running_median

FILES = names("schedule_refinement-")
EXACT = ROUNDING["float64"]


@pytest.mark.parametrize("name", [n for n in FILES if "gnorm" in load(n).arrays])
def test_golden(name, x64):
    golden = load(name)
    arrays, norms = golden.arrays, golden.arrays["gnorm"]
    if "bound_opt" in arrays:
        D = golden.meta["D"]
        best = arrays["sched"]
        bound = jax.jit(lambda s: last_iterate_bound(s, norms, D))
        np.testing.assert_allclose(bound(best), arrays["bound_opt"], rtol=BOUND)
        start = np.full_like(norms, D / np.sqrt(len(norms)))
        np.testing.assert_allclose(bound(start), arrays["bound_x0"], rtol=BOUND)
        constant = np.full_like(norms, D / np.sqrt(np.sum(norms**2)))
        np.testing.assert_allclose(bound(constant), arrays["bound_const"], rtol=BOUND)
        for t in range(len(best)):  # a minimum
            for factor in (0.999, 1.001):
                changed = best.copy()
                changed[t] *= factor
                assert bound(changed) >= bound(best) * (1 - 1e-9)
        return
    tau = golden.meta["tau"]
    np.testing.assert_allclose(running_median(norms, tau), arrays["smoothed"], rtol=EXACT)
    for weighting in ("sgd", "adam"):
        found = refined_schedule(norms, weighting, smoothing=tau)
        np.testing.assert_allclose(found, arrays[f"sched_{weighting}_norm"], atol=1e-12)
    raw = refined_schedule(norms, smoothing=0)
    np.testing.assert_allclose(raw, arrays["sched_sgd_raw_norm"], atol=1e-12)


def test_constant_norms_give_linear_decay():
    np.testing.assert_allclose(
        refined_schedule(np.full(50, 3.0)), np.linspace(1, 0, 50), atol=1e-14
    )


def test_what_does_not_change_the_schedule():
    norms = 1 + np.random.default_rng(0).random(80)
    plain = refined_schedule(norms)
    np.testing.assert_allclose(refined_schedule(1e200 * norms), plain, rtol=1e-12)
    np.testing.assert_allclose(refined_schedule(norms, lambda g: g**-2.0), plain, rtol=1e-12)
    np.testing.assert_array_equal(refined_schedule([*norms, np.nan, np.inf]), plain)
    spiked = np.full(80, 2.0)
    spiked[40] = 1e3
    np.testing.assert_allclose(refined_schedule(spiked), np.linspace(1, 0, 80), atol=1e-14)
    assert plain[-1] == 0
    assert np.all(plain >= 0)
    tails = plain * running_median(norms, 0.1) ** 2
    assert np.all(np.diff(tails) < 0)


def test_large_first_norms_are_a_warm_up():
    schedule = refined_schedule(1 + 9 * np.exp(-np.arange(100) / 10))
    assert schedule[0] < 0.05
    assert 10 < np.argmax(schedule) < 50


def test_interpolation_is_in_relative_time():
    values = [0.5, 1.0, 0.0]
    schedule = jax.jit(interpolated_schedule(values, total_steps=201, peak=2.0))
    found = [float(schedule(t)) for t in (0, 50, 100, 150, 200, 999)]
    np.testing.assert_allclose(found, [1.0, 1.5, 2.0, 1.0, 0.0, 0.0], atol=1e-6)
    warm = interpolated_schedule([1.0, 1.0], 100, 1.0, warmup_steps=3)
    np.testing.assert_allclose([warm(t) for t in range(5)], [0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("ord", [1, 2])
def test_norms_are_recorded_every_few_steps(ord):
    optimizer = optax.chain(record_norms(ord, capacity=3, every=2), optax.adam(0.1))
    state = optimizer.init({"a": jnp.zeros(2), "b": jnp.zeros(())})
    step = jax.jit(optimizer.update)
    for t in range(1, 9):
        _, state = step({"a": t * jnp.array([2.0, -1.0]), "b": t * jnp.array(2.0)}, state)
    one = 5 if ord == 1 else 3
    np.testing.assert_allclose(recorded_norms(state), one * np.array([1, 3, 5]), rtol=1e-6)


def test_half_precision_does_not_overflow():
    recorder = record_norms(1, capacity=1)
    state = recorder.init(jnp.zeros(4, jnp.float16))
    _, state = recorder.update(jnp.full(4, 6e4, jnp.float16), state)
    assert recorded_norms(state) == pytest.approx(2.4e5, rel=1e-3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: refined_schedule([1.0]), "at least two finite numbers above 0"),
        (lambda: refined_schedule([1.0, -1.0]), "at least two finite numbers above 0"),
        (lambda: refined_schedule([1.0, np.nan], drop_nonfinite=False), "at least two finite"),
        (lambda: refined_schedule(np.zeros(9)), "are 0 over a whole window"),
        (lambda: refined_schedule([1.0, 2.0], "lion"), "weighting must be 'sgd', 'adam'"),
        (lambda: refined_schedule([1.0, 2.0], smoothing=1.0), r"smoothing must be in \[0, 1\)"),
        (lambda: interpolated_schedule([1.0], 10, 0.1), "needs two values and two steps"),
        (lambda: record_norms(3, capacity=2), "ord must be 1 or 2"),
        (lambda: record_norms(capacity=0), "capacity must be a whole number above 0"),
        (lambda: recorded_norms(optax.adam(0.1).init(jnp.ones(2))), "one state of record_norms"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
