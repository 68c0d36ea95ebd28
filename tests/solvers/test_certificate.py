"""The certificates bound the true suboptimality, and the free subgradient is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solvers.snapshots import quadratic, snapshots
from tolerances import rounding

from optax_structured.regularizers import L0, GroupLasso, NuclearNorm
from optax_structured.regularizers.certificate import (
    certificate,
    duality_gap,
    free_subgradient,
    subgradient_bound,
)
from optax_structured.regularizers.proximal_gradient import majorised_step, step_size_metric

pytestmark = pytest.mark.usefixtures("x64")

COLUMNS = GroupLasso(group_axis=1, weight=1.0)
NUCLEAR = snapshots("nuclear-norm", "warm")
TRAINING = snapshots("subproblem-glasso_training", "warm")
CASES = [pytest.param(NuclearNorm(), *c.values, id=c.id) for c in NUCLEAR]
CASES += [pytest.param(COLUMNS, *c.values, id=c.id) for c in TRAINING]


def objective(regularizer, case, w):
    return quadratic(case["b"], case["P"], w) + case["tau"] * float(regularizer.value(w))


@pytest.mark.slow
@pytest.mark.parametrize("regularizer, case", CASES)
def test_above_the_true_suboptimality(regularizer, case):
    b, metric, tau = case["b"], case["P"], case["tau"]
    best = objective(regularizer, case, case["W"])
    noise = rounding("float64") * np.sum(b * b / metric)

    @jax.jit
    def step(y):
        peak = step_size_metric(regularizer, metric)
        w = majorised_step(regularizer, b, metric, peak, tau, y)
        s = free_subgradient(metric, peak, y, w)
        both = subgradient_bound(s, metric), duality_gap(regularizer, b, metric, tau, w)
        return w, both, certificate(regularizer, b, metric, tau, w, s)

    w = case["warm"]
    for _ in range(6):
        w, both, bound = step(w)
        assert bound == pytest.approx(float(min(both)), rel=rounding("float64"))
        assert objective(regularizer, case, np.asarray(w)) - best <= bound + noise
        assert np.sum(metric * np.square(w - case["W"])) <= 2 * bound + noise


@pytest.mark.slow
@pytest.mark.parametrize("case", NUCLEAR)
def test_free_subgradient_is_exact(case):
    """What is left of s after the gradient is tau times a subgradient of the nuclear norm."""
    b, metric, tau, y = case["b"], case["P"], case["tau"], case["warm"]
    peak = step_size_metric(NuclearNorm(), metric)
    w = majorised_step(NuclearNorm(), b, metric, peak, tau, y)
    dual = free_subgradient(metric, peak, y, w) - (metric * w - b)
    noise = rounding("float64") * np.linalg.norm(peak * y + b)
    assert NuclearNorm().dual_norm(dual) <= tau + noise
    np.testing.assert_allclose(
        np.sum(dual * w), tau * NuclearNorm().value(w), atol=noise * np.linalg.norm(w)
    )


@pytest.mark.parametrize("case", NUCLEAR)
def test_nothing_is_left_at_the_solution(case):
    gap = duality_gap(NuclearNorm(), case["b"], case["P"], case["tau"], case["W"])
    assert 0 <= gap <= 2 * case["duality_gap"] + rounding("float64") * abs(case["Q"])


def test_constant_metric_certifies_the_first_step():
    y = jnp.arange(6.0).reshape(2, 3)
    metric = jnp.full((2, 3), 3.0)
    w = majorised_step(NuclearNorm(), y, metric, metric[:1, :1], 0.7, y)
    assert subgradient_bound(free_subgradient(metric, metric[:1, :1], y, w), metric) == 0.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_in_low_precision(dtype):
    zeros, ones = jnp.zeros((3, 4), dtype), jnp.ones((3, 4), dtype)
    for regularizer in (NuclearNorm(), COLUMNS):
        bound = certificate(regularizer, zeros, ones, 0.0, zeros, zeros)
        assert bound == 0.0 and bound.dtype == jnp.float32


def test_needs_a_norm():
    ones = jnp.ones((2, 2))
    with pytest.raises(TypeError, match="L0 is not a norm"):
        certificate(L0(), ones, ones, 1.0, ones)
