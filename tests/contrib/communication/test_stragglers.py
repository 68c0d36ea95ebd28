"""Simulated rounds with slow workers: the published runs, loads, and jobs that are always known."""

import numpy as np
import pytest
from golden_files import load, names
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GOLDEN

from optax_structured.contrib.communication import (
    CodedRounds,
    Multiplexed,
    SelectiveRepeat,
    simulate,
)

RUNS = [name for name in names("gradient_coding-") if "scheme" in load(name).meta]


def scheme_of(meta):
    args, n = meta["args"], meta["n"]
    if meta["scheme"] == "GradientCoding":
        return CodedRounds(n, args["s"], strict=True)
    kind = {"SelectiveRepeatSGC": SelectiveRepeat, "MultiplexedSGC": Multiplexed}[meta["scheme"]]
    return kind(n, burst=args["B"], window=args["W"], spread=args["lambd"])


@pytest.mark.parametrize("name", RUNS)
def test_golden(name):
    golden = load(name)
    meta, arrays = golden.meta, golden.arrays
    scheme = scheme_of(meta)
    assert scheme.load == pytest.approx(meta["load"]) and scheme.delay == meta["delay"]
    if "s" in arrays:
        assert scheme.stragglers == arrays["s"]
    run = simulate(scheme, arrays["delays"], meta["n_jobs"], meta["mu"])
    state = arrays["state"]
    np.testing.assert_array_equal(run.done if state.ndim == 3 else run.done[:, 0], state)
    np.testing.assert_allclose(run.durations, arrays["durations"], rtol=GOLDEN)
    assert run.waited.sum() == meta["num_waits"]
    assert run.durations.sum() == pytest.approx(meta["total"])


SCHEMES = [
    CodedRounds(6, 0),
    CodedRounds(6, 2),
    SelectiveRepeat(6, burst=2, window=3, spread=3),
    SelectiveRepeat(6, burst=1, window=4, spread=4),
    Multiplexed(6, burst=1, window=3, spread=2),
    Multiplexed(6, burst=2, window=3, spread=5),
    Multiplexed(5, burst=2, window=4, spread=5),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**20), slow=st.floats(0, 0.6))
def test_every_job_is_known_in_time_whatever_the_delays(scheme, seed, slow):
    rng, jobs = np.random.default_rng(seed), 9
    shape = scheme.workers, jobs + scheme.delay
    delays = 1 + 0.1 * rng.random(shape) + 5 * (rng.random(shape) < slow)
    run = simulate(scheme, delays, jobs, mu=1.0)
    late_by = run.finished - np.arange(jobs)
    assert np.all((0 <= late_by) & (late_by <= scheme.delay))
    assert np.all(run.durations <= delays.max(0))


def test_published_loads_and_that_data_are_covered_once():
    loads = [
        CodedRounds(256, 15),
        SelectiveRepeat(256, burst=2, window=3, spread=23),
        Multiplexed(256, burst=1, window=2, spread=27),
        CodedRounds(256, 0),
    ]
    expected = [0.0625, 0.0508, 0.00754, 1 / 256]
    np.testing.assert_allclose([s.load for s in loads], expected, rtol=1e-3)
    for n, burst, window, spread in ((6, 2, 4, 3), (5, 1, 3, 4)):
        unit = 1 / (n * (burst + (window - 1) * (spread + 1)))
        own, coded = n * (window - 1) * (spread + 1) * unit, burst * n * unit
        assert own + coded == pytest.approx(1)
        slots = window - 1 + burst
        assert Multiplexed(n, burst, window, spread).load == pytest.approx(
            (spread + 1) * unit * slots
        )
    for n in (4, 7):  # the converse, with equality for spread n - 1 and n
        for spread in (n - 1, n):
            bound = (3 - 1 + 2) / (n * (3 - 1) + 2 * (n - spread))
            assert Multiplexed(n, 2, 3, spread).load == pytest.approx(bound)


def test_no_stragglers_take_the_time_of_the_slowest():
    delays = 1 + np.random.default_rng(0).random((4, 5))
    run = simulate(CodedRounds(4, 0), delays, 5, mu=0.01)
    np.testing.assert_array_equal(run.durations, delays.max(0))


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match=r"\(workers, jobs \+ delay\) = \(4, 5\), got \(4, 3\)"):
        simulate(CodedRounds(4, 1), np.ones((4, 3)), 5)
    with pytest.raises(ValueError, match="multiple of burst = 2 plus 1, got 4"):
        SelectiveRepeat(8, burst=2, window=4, spread=2)
    with pytest.raises(ValueError, match="1 <= burst < window"):
        Multiplexed(8, burst=3, window=3, spread=2)
