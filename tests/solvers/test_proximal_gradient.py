"""Proximal gradient: the authors' iterates and iteration counts, and the accelerated variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solvers.snapshots import arguments, nuclear, snapshots, solve
from tolerances import CERTIFIED, GOLDEN, assert_close, rounding

from optax_structured.proximal.solvers import Exact, ProximalGradient
from optax_structured.regularizers import L1, GroupLasso, NuclearNorm
from optax_structured.regularizers.proximal_gradient import (
    accelerated_proximal_gradient,
    proximal_gradient,
)

pytestmark = pytest.mark.usefixtures("x64")

COLUMNS = GroupLasso(group_axis=1, weight=1.0)


# (max_iters, rtol) of the authors' runs; `W_pg5` is where the one of at most 5 steps stopped.
LIMITS = ((100, 1e-8), (5, 1e-3))
PUBLISHED = [
    pytest.param(regularizer, *case.values, max_iters, rtol, id=f"{case.id}-{max_iters}")
    for kind, regularizer in (("group-lasso", COLUMNS), ("nuclear-norm", NuclearNorm()))
    for max_iters, rtol in LIMITS
    for case in snapshots(kind, "warm", f"W_pg{max_iters}")
]


@pytest.mark.parametrize("regularizer, case, max_iters, rtol", PUBLISHED)
def test_as_published(regularizer, case, max_iters, rtol):
    limits = {"max_iters": max_iters, "rtol": rtol}
    point, iterations = proximal_gradient(regularizer, *arguments(case), **limits)
    assert_close(point, case[f"W_pg{max_iters}"], GOLDEN)
    # Of groups, the authors do not even start where all are screened.
    least = 2 if regularizer == COLUMNS else 1
    assert iterations == max(case[f"pg{max_iters}_iterations"], least)
    solved = solve(ProximalGradient(**limits), regularizer, *arguments(case))
    np.testing.assert_array_equal(solved, point)


@pytest.mark.slow
@pytest.mark.parametrize("case", snapshots("subproblem-glasso_training"))
def test_acceleration_reaches_the_exact_solution(case):
    solver = ProximalGradient(max_iters=2000, rtol=1e-11, accelerate=True)
    found = solve(solver, COLUMNS, *arguments(case))
    assert_close(found, case["W"], CERTIFIED["float64"])


def test_acceleration_takes_fewer_steps():
    case = nuclear("square")
    found, iterations = accelerated_proximal_gradient(
        NuclearNorm(), case["b"], case["P"], case["tau"], case["warm"], max_iters=100, rtol=1e-2
    )
    assert iterations < case["pg100_iterations"]

    def error(w):
        return np.linalg.norm(w - case["W"])

    assert error(found) < error(case["W_pg100"]) / 10


def test_cap_holds():
    case = nuclear("square")
    problem = case["b"], case["P"], case["tau"], case["warm"]
    _, iterations = accelerated_proximal_gradient(NuclearNorm(), *problem, max_iters=7, rtol=1e-12)
    assert iterations == 7


def test_entrywise_penalties_are_solved_in_one_step():
    rng = np.random.default_rng(0)
    linear, centre, warm = rng.normal(size=(3, 5, 4))
    metric = np.exp(rng.normal(size=(5, 4)))
    problem = linear, metric, centre, 0.5
    point, iterations = proximal_gradient(L1(), *problem, warm)
    exact = solve(Exact(), L1(), *problem, warm)
    np.testing.assert_allclose(point, exact, rtol=rounding("float64"), atol=rounding("float64"))
    np.testing.assert_array_equal(point == 0, exact == 0)
    assert iterations == 2


@pytest.mark.parametrize("solver", [Exact(), ProximalGradient(), ProximalGradient(accelerate=True)])
@pytest.mark.parametrize("regularizer", [COLUMNS, NuclearNorm()])
def test_a_metric_of_one_number_is_solved_in_closed_form(solver, regularizer):
    rng = np.random.default_rng(1)
    linear, centre, warm = rng.normal(size=(3, 5, 4))
    found = solve(solver, regularizer, linear, 2.0, centre, 1.5, warm)
    expected = regularizer.prox(centre - linear / 2.0, 2.0, 1.5)
    np.testing.assert_allclose(found, expected, atol=rounding("float64"))


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", [COLUMNS, NuclearNorm()])
@pytest.mark.parametrize("solver", [ProximalGradient(), ProximalGradient(40, 1e-4, True)])
def test_zeros_and_nan(regularizer, solver):
    zeros, ones = jnp.zeros((4, 3)), jnp.ones((4, 3))
    metric = ones.at[0, 0].set(2.0)
    for strength in (0.0, 1.0):
        found = solve(solver, regularizer, zeros, metric, zeros, strength, zeros)
        np.testing.assert_array_equal(found, zeros)
    poisoned = proximal_gradient(regularizer, ones * jnp.nan, metric, zeros, 1.0, zeros)
    assert poisoned.iterations <= 2
    empty = jnp.zeros((0, 3))
    assert solve(solver, regularizer, empty, empty, empty, 1.0, empty).shape == (0, 3)


def test_batch_runs_to_the_slowest():
    """Under vmap each member gets what it gets alone."""
    steps = ("training step 90 (10,32)", "training step 360 (10,32)", "training step 630 (10,32)")
    cases = [nuclear(step) for step in steps]
    stacked = [np.stack(x) for x in zip(*map(arguments, cases), strict=True)]
    solver = ProximalGradient()
    together = jax.jit(jax.vmap(lambda *a: solve(solver, NuclearNorm(), *a)))(*stacked)
    for case, found in zip(cases, together, strict=True):
        assert_close(found, case["W_pg100"], GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_precision_is_kept(dtype):
    ones = jnp.ones((4, 3), dtype)
    for solver in (ProximalGradient(), ProximalGradient(accelerate=True)):
        assert solve(solver, COLUMNS, -ones, ones, ones, 0.1, ones).dtype == dtype


@pytest.mark.parametrize("arguments", [{"max_iters": 0}, {"rtol": -1.0}, {"rtol": float("nan")}])
def test_bad_limits_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ProximalGradient(**arguments)
