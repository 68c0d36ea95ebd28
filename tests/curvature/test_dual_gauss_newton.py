"""Exact Gauss-Newton steps: recorded runs, both forms, and limiting cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import GAUSS_NEWTON, assert_close

from optax_structured.curvature import mean_square, scale_by_dual_gauss_newton


def network(meta):
    """The model that `meta` describes: mean-field, with one hidden layer."""
    d, M, C = meta["d"], meta["M"], meta["C"]

    def outputs(flat, batch):
        X, Y = batch
        u, v = flat[: M * d].reshape(M, d), flat[M * d :].reshape(C, M)
        return jax.nn.silu(X @ u.T) @ v.T / M - Y

    return outputs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("gauss_newton-"))
def test_golden(name):
    golden = load(name)
    h = golden.hyperparameters
    element = scale_by_dual_gauss_newton(
        h["damping"], adaptive={"fixed": False, "adaptive": True}[h["damping_kind"]]
    )
    outputs = network(golden.meta)
    batch = tuple(jnp.asarray(golden.arrays[f"inputs/{key}"]) for key in "XY")

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: mean_square(outputs(p, batch)))(params)
        direction, state = element.update(grads, state, params, residual_fn=outputs, batch=batch)
        params = params - h["lr"] * direction
        return (params, state), (params, direction, loss)

    start = jnp.asarray(golden.start["flat"])
    run = jax.jit(lambda w: jax.lax.scan(step, (w, element.init(w)), length=golden.meta["steps"]))
    _, (path, directions, losses) = run(start)
    assert_close(path, golden.arrays["params/flat"], GAUSS_NEWTON)
    assert_close(directions, golden.arrays["state/direction/flat"], GAUSS_NEWTON)
    np.testing.assert_allclose(losses, golden.arrays["outputs/loss"], rtol=GAUSS_NEWTON)


def direction(element, params, **arguments):
    grads = jax.tree.map(jnp.zeros_like, params)
    return jax.jit(lambda p: element.update(grads, element.init(p), p, **arguments)[0])(params)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 9])
def test_general_losses_agree_with_the_primal_form(n, x64):
    """Cross entropy, whose Hessian in the logits is singular; more and fewer outputs than D."""
    keys = jax.random.split(jax.random.key(0), 3)
    X, w = jax.random.normal(keys[0], (n, 2), float), jax.random.normal(keys[1], (2, 3), float)
    labels = jax.random.randint(keys[2], (n,), 0, 3)
    loss = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()  # noqa: E731
    outputs = lambda w: jnp.tanh(X @ w)  # noqa: E731
    found = direction(scale_by_dual_gauss_newton(0.01, loss=loss), w, residual_fn=outputs)
    J = jax.jacobian(lambda v: outputs(v.reshape(2, 3)).ravel())(w.ravel())
    H = jax.hessian(lambda z: loss(z.reshape(n, 3)))(outputs(w).ravel())
    g = J.T @ jax.grad(lambda z: loss(z.reshape(n, 3)))(outputs(w).ravel())
    np.testing.assert_allclose(
        found.ravel(), np.linalg.solve(J.T @ H @ J + 0.01 * np.eye(6), g), rtol=1e-9
    )
    inverse = direction(scale_by_dual_gauss_newton(0.0, loss=loss), w, residual_fn=outputs)
    pseudo = np.linalg.pinv(J.T @ H @ J, rcond=1e-10, hermitian=True) @ g
    np.testing.assert_allclose(inverse.ravel(), pseudo, rtol=1e-6, atol=1e-8)


def test_linear_models_are_solved_in_one_step_and_damping_leads_to_the_gradient(x64):
    X = jax.random.normal(jax.random.key(1), (4, 7), float)
    y = jnp.arange(4.0)
    params = {"w": jnp.zeros(5), "b": jnp.ones(2)}
    residual = lambda p: X @ jnp.concatenate([p["w"], p["b"]]) - y  # noqa: E731
    step = direction(scale_by_dual_gauss_newton(0.0), params, residual_fn=residual)
    after = jax.tree.map(jnp.subtract, params, step)
    np.testing.assert_allclose(residual(after), 0, atol=1e-12)
    after = jax.tree.map(lambda p, d: p - 0.3 * d, params, step)
    ratio = mean_square(residual(after)) / mean_square(residual(params))
    np.testing.assert_allclose(ratio, (1 - 0.3) ** 2, rtol=1e-10)
    grad = jax.grad(lambda p: mean_square(residual(p)))(params)
    far = direction(scale_by_dual_gauss_newton(1e9), params, residual_fn=residual)
    for leaf in params:
        assert_close(1e9 * far[leaf], grad[leaf], 1e-7)


def test_misuse():
    element = scale_by_dual_gauss_newton()
    state = element.init(jnp.ones(2))
    with pytest.raises(ValueError, match="needs the outputs of the batch.*residual_fn=lambda"):
        element.update(jnp.ones(2), state, jnp.ones(2))
    with pytest.raises(ValueError, match="needs the current parameters"):
        element.update(jnp.ones(2), state, residual_fn=lambda w: w)
    with pytest.raises(ValueError, match="damping must be a finite number of at least 0"):
        scale_by_dual_gauss_newton(-1.0)
