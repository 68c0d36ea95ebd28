"""The nuclear norm: closed form, exact solutions in a metric, exact rank, structure."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers.snapshots import arguments, nuclear, snapshots, solve
from tolerances import CERTIFIED, FACTORED, assert_close, rounding

from optax_structured.proximal.solvers import Exact, WeightedALS
from optax_structured.regularizers import L1, NuclearNorm
from optax_structured.regularizers.base import piece_size
from optax_structured.regularizers.certificate import certificate
from optax_structured.trees.axes import Axes

NUCLEAR = NuclearNorm()


@jax.jit
def minimise(b, metric, strength):
    return NUCLEAR.prox(b / metric, metric, strength)


def problem(seed, shape, spread=1.0, dtype=np.float32):
    b, logarithm = np.random.default_rng(seed).normal(size=(2, *shape))
    return b.astype(dtype), np.exp(spread * logarithm).astype(dtype)


def size(metric, w):
    return np.sqrt(np.sum(metric * np.square(w)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", snapshots("nuclear-norm", "warm"))
def test_exact_solution(case):
    w = jax.jit(lambda *a: solve(Exact(), NUCLEAR, *a))(*arguments(case))
    assert_close(w, case["W"], CERTIFIED["float64"])
    assert np.sum(NUCLEAR.support(w)) == case["rank"]


@pytest.mark.slow
@pytest.mark.parametrize("case", snapshots("subproblem-nuclear"))
def test_exact_solution_in_float32(case):
    w = solve(Exact(), NUCLEAR, *(np.asarray(a, np.float32) for a in arguments(case)))
    assert w.dtype == jnp.float32
    # The certificate speaks of the norm of the metric: entries without gradient hardly count.
    assert size(case["P"], w - case["W"]) <= CERTIFIED["float32"] * size(case["P"], case["W"])
    assert np.sum(NUCLEAR.support(w)) == case["rank"]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", snapshots("subproblem-nuclear"))
def test_alternating_least_squares(case):
    solver = WeightedALS(max_rank=case["rank"] + 2, sweeps=8)
    w = solve(solver, NUCLEAR, *arguments(case))
    scale = max(np.linalg.norm(case["W"]), 1.0)
    assert np.linalg.norm(w - case["W"]) <= FACTORED * scale
    if case["rank"] == 0:
        assert np.all(w == 0.0)


@pytest.mark.usefixtures("x64")
def test_alternating_least_squares_converges():
    case = nuclear("square")
    w = solve(WeightedALS(max_rank=6, sweeps=200), NUCLEAR, *arguments(case))
    assert_close(w, case["W"], CERTIFIED["float64"])


@pytest.mark.usefixtures("x64")
def test_certificate_tells_a_rank_bound_that_is_too_low():
    case = nuclear("training step 90 (10,32)")
    left = [
        certificate(
            NUCLEAR,
            case["b"],
            case["P"],
            case["tau"],
            solve(WeightedALS(max_rank=rank, sweeps=100), NUCLEAR, *arguments(case)),
        )
        for rank in (4, 10)
    ]
    assert left[0] > 100 * left[1]


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Exact(), WeightedALS(max_rank=2)])
def test_zero_iff_spectral_norm_is_at_most_the_strength(solver):
    b, metric = problem(0, (5, 4))
    edge = float(NUCLEAR.dual_norm(b))
    zeros = jnp.zeros_like(b)
    at = jax.jit(lambda strength: solve(solver, NUCLEAR, -b, metric, zeros, strength, b))
    for factor in (1.001, 1.1, 10.0):
        w = at(factor * edge)
        assert np.all(w == 0.0)
        assert not np.any(NUCLEAR.support(w))
    w = solve(Exact(), NUCLEAR, -b, metric, zeros, 0.999 * edge, b)
    assert np.any(w != 0.0)
    assert np.sum(NUCLEAR.support(w)) == 1


@pytest.mark.parametrize("solver", [Exact(), WeightedALS(max_rank=4)])
def test_no_strength_no_shrinkage(solver):
    b, metric = problem(1, (5, 4))
    w = solve(solver, NUCLEAR, -b, metric, jnp.zeros_like(b), 0.0, b)
    np.testing.assert_array_equal(w, jnp.asarray(b) / metric)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("solver", [Exact(), WeightedALS(max_rank=2)])
def test_zeros_stay_zero(dtype, solver):
    zeros, metric = jnp.zeros((4, 3), dtype), jnp.ones((4, 3), dtype).at[0, 0].set(1e-6)
    at = jax.jit(lambda strength: solve(solver, NUCLEAR, zeros, metric, zeros, strength, zeros))
    for strength in (0.0, 1.0, 1e8):
        w = at(strength)
        np.testing.assert_array_equal(w, np.zeros((4, 3), np.float32))
    assert NUCLEAR.value(zeros) == 0.0 and NUCLEAR.dual_norm(zeros) == 0.0
    assert not np.any(NUCLEAR.support(zeros))


@pytest.mark.parametrize("solver", [Exact(), WeightedALS(max_rank=2)])
def test_leaves_without_entries(solver):
    empty = jnp.zeros((0, 3))
    assert solve(solver, NUCLEAR, empty, empty, empty, 1.0, empty).shape == (0, 3)
    assert NUCLEAR.value(empty) == 0.0 and NUCLEAR.dual_norm(empty) == 0.0
    assert NUCLEAR.support(empty).shape == (0,)


def test_low_precision_is_computed_in_float32():
    b, metric = (jnp.asarray(x, jnp.bfloat16) for x in problem(2, (6, 4)))
    w = minimise(b, metric, 1.0)
    assert w.dtype == jnp.float32
    wide = minimise(b.astype(jnp.float32), metric.astype(jnp.float32), 1.0)
    np.testing.assert_array_equal(w, wide)
    assert np.sum(NUCLEAR.support(w.astype(jnp.bfloat16))) == np.sum(NUCLEAR.support(w))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Exact(), WeightedALS(max_rank=3)])
def test_stacked_matrices_are_independent(solver):
    """Batch axes, vmap and a loop over matrices agree, whatever the axes' order."""
    b, metric = problem(3, (3, 5, 4))
    b[1] *= 1e-3  # vanishes
    zeros = jnp.zeros_like(b)

    @partial(jax.jit, static_argnums=0)
    def from_b(regularizer, b, metric):
        return solve(solver, regularizer, -b, metric, jnp.zeros_like(b), 1.0, b)

    alone = np.stack([from_b(NUCLEAR, *x) for x in zip(b, metric, strict=True)])
    assert np.all(alone[1] == 0.0)
    moved = NuclearNorm(axes=Axes(rows=0, cols=2))
    swap = lambda x: np.moveaxis(x, 1, 0)  # noqa: E731
    for found in (
        jax.jit(lambda *x: from_b(NUCLEAR, *x))(b, metric),
        jax.jit(jax.vmap(lambda *x: from_b(NUCLEAR, *x)))(b, metric),
        swap(from_b(moved, swap(b), swap(metric))),
    ):
        assert_close(found, alone, CERTIFIED["float32"])
    assert NUCLEAR.support(alone).shape == (3, 4)
    assert NUCLEAR.value(zeros + b) == pytest.approx(sum(float(NUCLEAR.value(x)) for x in b))


def test_flattened_axes():
    """A convolution kernel (height, width, in, out) seen as (height * width * in, out)."""
    b, metric = problem(4, (2, 2, 3, 5))
    kernel = NuclearNorm(axes=Axes(rows=(0, 1, 2), cols=3))
    expected = minimise(b.reshape(12, 5), metric.reshape(12, 5), 1.0).reshape(b.shape)
    assert_close(kernel.prox(b / metric, metric, 1.0), expected, CERTIFIED["float32"])
    assert kernel.coupled_axes(4) == (0, 1, 2, 3) and piece_size(kernel, b.shape) == 12


def test_in_scan_with_traced_strength():
    b, metric = problem(5, (4, 3))

    @jax.jit
    def path(strengths):
        return jax.lax.scan(lambda c, t: (c, minimise(b, metric, t)), 0, strengths)[1]

    strengths = jnp.array([0.0, 0.5, 1.0, 100.0])
    for w, strength in zip(path(strengths), strengths, strict=True):
        assert_close(w, minimise(b, metric, strength), CERTIFIED["float32"])


@pytest.mark.parametrize("spec", [("x", None), (None, "y"), ("x", "y")])
def test_sharded_matrices(spec):
    b, metric = problem(9, (8, 6))
    expected = minimise(b, metric, 1.0)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        b, metric = jax.device_put((b, metric), sharding)
        w = minimise(b, metric, 1.0)
        assert w.sharding == sharding
        assert_close(w, expected, CERTIFIED["float32"])
        assert jax.jit(NUCLEAR.support)(w).shape == (6,)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1e-8, 1e6]), st.floats(0.1, 3.0))
def test_scale_invariance(seed, scale, strength):
    b, metric = problem(seed, (4, 3))
    w = minimise(b, metric, strength)
    same = minimise(scale * b, scale * metric, scale * strength)
    assert size(metric, same - w) <= CERTIFIED["float32"] * size(metric, b / metric)


def test_constant_metric_in_either_form():
    b, _ = problem(6, (5, 4))
    expected = NUCLEAR.prox(b / 2.0, 2.0, 1.0)
    for metric in (np.full((1, 1), 2.0, np.float32), np.full((5, 4), 2.0, np.float32)):
        np.testing.assert_allclose(
            minimise(b, metric, 1.0), expected, atol=10 * rounding("float32")
        )


def test_nan_stops_at_once():
    b, metric = problem(7, (4, 3))
    limited = NuclearNorm(max_iters=10**9)
    assert np.all(np.isnan(limited.prox(b * np.nan, metric, 1.0)))


def test_metric_of_enormous_spread_ends():
    """Rounding error keeps the certificate above its target, and the loop must end all the same."""
    b, _ = problem(8, (6, 5))
    metric = np.exp(np.linspace(-12, 12, 30, dtype=np.float32)).reshape(6, 5)
    w = NuclearNorm(max_iters=10**6).prox(b, metric, 1e-3)
    assert np.all(np.isfinite(w))


@pytest.mark.parametrize(
    "build, error",
    [
        (lambda: NuclearNorm(max_iters=0), ValueError),
        (lambda: NuclearNorm(rtol=0.0), ValueError),
        (lambda: WeightedALS(max_rank=0), ValueError),
        (lambda: WeightedALS(max_rank=2, sweeps=0), ValueError),
        (lambda: NUCLEAR.check((3,)), ValueError),
    ],
)
def test_misuse_is_refused(build, error):
    with pytest.raises(error, match=r"max_iters|rtol|max_rank|sweeps|axis"):
        build()


def test_alternating_least_squares_is_for_the_nuclear_norm():
    ones = jnp.ones((2, 2))
    with pytest.raises(TypeError, match="NuclearNorm, got L1"):
        solve(WeightedALS(max_rank=1), L1(), ones, ones, ones, 1.0, ones)
