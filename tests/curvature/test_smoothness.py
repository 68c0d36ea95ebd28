"""Gradient-normalized smoothness: published runs, and special cases."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import GOLDEN, assert_close

from optax_structured.curvature import hvp, scale_by_gns


def chebyshev(x):
    return jnp.concatenate([(1 - x[:1]) / 2, x[1:] - (2 * x[:-1] ** 2 - 1)])


def problem(golden):
    """Loss and approximate Hessian of the problem that a file names, by its words."""
    data = {key: jnp.asarray(x) for key, x in golden.leaves("data").items()}
    words = golden.meta["problem"] + golden.meta["hyper"].get("hessian", "") + golden.meta["case"]
    if "lse" in words or "logsumexp" in words:
        A, b, mu = data["A"], data["b"], data["mu"]
        loss = lambda x: mu * jax.nn.logsumexp((A @ x - b) / mu)  # noqa: E731
        if "hessian" in golden.meta["hyper"]:
            return loss, lambda x: (A.T * jax.nn.softmax((A @ x - b) / mu)) @ A / mu
        return loss, jax.hessian(loss)
    if "100(x2" in words or "rosenbrock" in words:
        loss = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2  # noqa: E731
        return loss, jax.hessian(loss)
    u = chebyshev if "chebyshev" in words else lambda x: data["A"] @ x - data["b"]
    loss = lambda x: jnp.sum(u(x) ** 2) ** 2 / 4  # noqa: E731

    def hessian(x):
        J, r = jax.jacobian(u)(x), u(x)
        fisher = 2 * jnp.outer(J.T @ r, J.T @ r)
        return fisher if "fisher" in words else fisher + jnp.sum(r**2) * J.T @ J

    return loss, hessian


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("gns-"))
def test_golden(name):
    golden = load(name)
    meta, arrays = golden.meta, golden.arrays
    loss, hessian = problem(golden)
    assert meta["gamma_min"] == 1e-9
    optimizer = scale_by_gns(
        hessian, metric=arrays.get("B"), gamma=meta["gamma_0"], eps=meta["eps"]
    )
    both = jax.value_and_grad(loss)

    @jax.jit
    def step(x, state, value, grad):
        updates, state = optimizer.update(
            grad, state, x, value=value, grad=grad, value_and_grad_fn=both
        )
        return optax.apply_updates(x, updates), state

    x = jnp.asarray(arrays["x0"])
    state, (value, grad), solves = optimizer.init(x), both(x), 0
    iterations = re.search(r"success, (\d+) iters", meta["status"])
    for k in range(len(arrays["x"])):
        np.testing.assert_allclose(x, arrays["x"][k], rtol=GOLDEN, atol=GOLDEN)
        np.testing.assert_allclose(value, arrays["f"][k], rtol=GOLDEN)
        np.testing.assert_allclose(state.gamma, arrays["gamma"][k], rtol=GOLDEN)
        assert solves == arrays["matrix_inverses"][k]
        x, state = step(x, state, value, grad)
        value, grad, solves = state.value, state.grad, solves + int(state.num_trials)
    if iterations and "f_star" in meta["hyper"]:
        assert arrays["f"][-1] - meta["hyper"]["f_star"] < meta["eps"]


def steps(optimizer, loss, w, n):
    both = jax.value_and_grad(loss)

    def step(carry, _):
        w, state = carry
        value, grad = optax.value_and_grad_from_state(loss)(w, state=state)
        updates, state = optimizer.update(
            grad, state, w, value=value, grad=grad, value_and_grad_fn=both
        )
        return (optax.apply_updates(w, updates), state), (updates, state.gamma)

    (w, _), (moves, radii) = jax.jit(
        lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=n)
    )(w)
    return w, moves, radii


SCALES = jnp.array([1.0, 4.0, 0.5])


def quadratic(w):
    return jnp.sum(SCALES * w**2) / 2


def test_newton_on_a_quadratic_doubles_the_radius(x64):
    w = jnp.array([3.0, -2.0, 1.0], float)
    final, moves, radii = steps(scale_by_gns(jax.hessian(quadratic)), quadratic, w, 5)
    np.testing.assert_array_equal(radii, 2.0 ** np.arange(1, 6))
    assert np.all(np.linalg.norm(moves, axis=1) <= np.concatenate([[1], radii[:-1]]))
    assert quadratic(final) < 1e-6
    cg = scale_by_gns(lambda w: hvp(quadratic, w), solver="cg")
    assert_close(steps(cg, quadratic, w, 3)[1], moves[:3], 1e-5)


def test_no_hessian_is_normalised_descent():
    w = jnp.array([3.0, -2.0, 1.0])
    _, moves, radii = steps(scale_by_gns(), quadratic, w, 1)
    grad = jax.grad(quadratic)(w)
    np.testing.assert_allclose(moves[0], -radii[0] / 2 * grad / jnp.linalg.norm(grad), rtol=1e-5)


def test_scale_of_the_loss_does_not_matter(x64):
    loss = lambda w: jnp.sum(jnp.cosh(w))  # noqa: E731
    w = jnp.array([3.0, -2.0, 1.0], float)
    scaled = lambda w: 1e6 * loss(w)  # noqa: E731
    plain = steps(scale_by_gns(jax.hessian(loss)), loss, w, 4)
    other = steps(scale_by_gns(jax.hessian(scaled)), scaled, w, 4)
    assert_close(other[1], plain[1], 1e-7)


def test_affine_maps_of_the_parameters_do_not_matter(x64):
    """w = S v with the metric S' S: the same points."""
    S = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)) + 2 * np.eye(3))
    w = jnp.array([3.0, -2.0, 1.0], float)
    loss = lambda w: jnp.sum(jnp.cosh(w))  # noqa: E731
    mapped = lambda v: loss(S @ v)  # noqa: E731
    plain = steps(scale_by_gns(jax.hessian(loss)), loss, w, 4)[1]
    there = scale_by_gns(jax.hessian(mapped), metric=S.T @ S)
    assert_close(steps(there, mapped, jnp.linalg.solve(S, w), 4)[1] @ S.T, plain, 1e-8)


def test_indefinite_systems_and_nan_are_failed_trials():
    saddle = lambda w: w[0] ** 4 + w[1] ** 4 - 5 * w[0] ** 2 * w[1] ** 2  # noqa: E731
    w = jnp.array([1.0, 1.0])
    final, moves, _ = steps(scale_by_gns(jax.hessian(saddle), gamma=1e3), saddle, w, 1)
    assert bool(jnp.all(jnp.isfinite(final)))
    assert saddle(final) < saddle(w)
    wall = lambda w: jnp.where(jnp.max(jnp.abs(w)) < 2.5, jnp.nan, quadratic(w))  # noqa: E731
    final, moves, _ = steps(scale_by_gns(max_trials=3), wall, jnp.array([3.0, 0.0, 0.0]), 1)
    assert bool(jnp.all(jnp.isfinite(final)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: scale_by_gns(solver="lu"), "solver must be 'cholesky' or 'cg'"),
        (lambda: scale_by_gns(solver="cg", metric=jnp.eye(2)), "'cg' takes the metric I"),
        (lambda: scale_by_gns(gamma=0.0), "gamma must be a finite number above 0"),
        (lambda: steps(scale_by_gns(lambda w: jnp.eye(2)), quadratic, SCALES, 1), "must be .3, 3."),
        (
            lambda: scale_by_gns().update(SCALES, scale_by_gns().init(SCALES), SCALES),
            "scale_by_gns tries steps: call update",
        ),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
