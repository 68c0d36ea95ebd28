"""Sparse Newton steps for transport: the reference plans, invariances, and implicit derivatives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import load, names
from tolerances import GOLDEN

from optax_structured.contrib.solvers import sinkhorn_newton


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("sinkhorn_newton_sparse-"))
def test_golden(name):
    golden = load(name)
    meta, arrays = golden.meta, golden.arrays
    cost, r, c = (jnp.asarray(arrays[f"inputs/{key}"]) for key in ("cost", "r", "c"))
    share = float(meta["target_sparsity"].removesuffix("/n")) / len(r)
    found = sinkhorn_newton(
        cost,
        r,
        c,
        meta["eta"],
        warmup=meta["N1"],
        keep=math.ceil(share * cost.size - 1e-9),
        tolerance=meta["tolerance"],
    )
    assert found.error <= meta["tolerance"]
    assert abs(int(found.newton_steps) - len(arrays["outputs/step_sizes"])) <= 2
    np.testing.assert_allclose(found.plan, arrays["outputs/plan"], atol=1e-2 * GOLDEN)
    np.testing.assert_allclose(found.x, arrays["outputs/x_centered"], atol=GOLDEN)
    np.testing.assert_allclose(found.y, arrays["outputs/y_plus_mean_x"], atol=GOLDEN)
    np.testing.assert_allclose(
        jnp.sum(found.plan * cost), arrays["outputs/transport_cost"], rtol=GOLDEN
    )


def problem(n=6, m=8, seed=0):
    rng = np.random.default_rng(seed)
    r, c = rng.random(n) + 0.5, rng.random(m) + 0.5
    return tuple(jnp.asarray(a) for a in (rng.random((n, m)), r / r.sum(), c / c.sum()))


def test_invariances(x64):
    cost, r, c = problem()
    solve = jax.jit(lambda cost, r, c, eta: sinkhorn_newton(cost, r, c, eta))
    found = solve(cost, r, c, 100.0)
    assert found.error < 1e-12
    np.testing.assert_allclose(found.plan.sum(1), r, atol=1e-12)
    shifted = solve(cost + r[:, None] + 2 * c, r, c, 100.0)
    np.testing.assert_allclose(shifted.plan, found.plan, atol=1e-10)
    order = jnp.array([3, 1, 0, 5, 4, 2])
    permuted = solve(cost[order], r[order], c, 100.0)
    np.testing.assert_allclose(permuted.plan, found.plan[order], atol=1e-10)
    np.testing.assert_allclose(solve(cost, r, c, 1e-6).plan, jnp.outer(r, c), atol=1e-6)


@pytest.mark.slow
def test_derivatives_are_those_of_the_solution(x64):
    """The regularised cost has the plan as its slope; anything else, differences."""
    cost, r, c = problem(3, 4)

    def solve(cost, eta, r):
        return sinkhorn_newton(cost, r, c, eta).plan

    def value(cost):
        plan = solve(cost, 30.0, r)
        return jnp.sum(plan * cost) + jnp.sum(plan * jnp.log(plan)) / 30.0

    np.testing.assert_allclose(jax.jit(jax.grad(value))(cost), solve(cost, 30.0, r), atol=1e-8)
    loss = jax.jit(lambda cost, eta, r: jnp.sum(jnp.sin(9 * solve(cost, eta, r))))
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(cost, 30.0, r)
    h = 1e-5
    e = jnp.zeros_like(cost).at[1, 2].set(h)
    differences = [
        (slopes[0][1, 2], loss(cost + e, 30.0, r) - loss(cost - e, 30.0, r)),
        (slopes[1], loss(cost, 30.0 + h, r) - loss(cost, 30.0 - h, r)),
    ]
    along = jnp.array([h, -h, 0.0])  # of the marginals: their sum stays
    change = loss(cost, 30.0, r + along) - loss(cost, 30.0, r - along)
    differences.append((slopes[2] @ along / h, change))
    for slope, difference in differences:
        np.testing.assert_allclose(slope, difference / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_float32_and_vmap_are_finite():
    cost, r, c = (a.astype(jnp.float32) for a in problem())
    both = jax.vmap(lambda cost: sinkhorn_newton(cost, r, c, 200.0, max_steps=20))
    found = both(jnp.stack([cost, 1 - cost]))
    assert found.plan.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(found.plan)) and jnp.all(found.error < 1e-3)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match=r"a cost \(n, m\), rows \(n,\) and columns \(m,\), got"):
        sinkhorn_newton(jnp.ones((2, 3)), jnp.ones(3), jnp.ones(2), 10.0)
    with pytest.raises(ValueError, match="eta must be a finite number above 0"):
        sinkhorn_newton(jnp.ones((2, 3)), jnp.ones(2), jnp.ones(3), -1.0)
