"""Convex ReLU networks: the interior-point optima, and that the network attains them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import load, names
from tolerances import GOLDEN

from optax_structured.contrib.solvers import (
    activation_patterns,
    convex_relu,
    convex_relu_objective,
    recover_network,
)

LOSSES = {"mse": "squared", "bce": "logistic"}
# Interior-point optima are good to 1e-7, and so are the steps taken here for the logistic loss.
OPTIMUM = {"squared": 1e-7, "logistic": 1e-6}


def network_objective(x, y, hidden, out, strength, loss):
    f = jax.nn.relu(x @ hidden) @ out
    fit = jnp.sum((f - y) ** 2) / 2
    if loss == "logistic":
        fit = jnp.sum(jnp.logaddexp(0, 2 * f) - 2 * y * f)
    return fit + strength / 2 * (jnp.sum(hidden**2) + jnp.sum(out**2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("convex_relu-"))
def test_golden(name):
    golden = load(name)
    meta, arrays = golden.meta, golden.arrays
    loss, beta = LOSSES[meta["loss"]], meta["beta"]
    x, y, patterns = (jnp.asarray(arrays[f"inputs/{key}"]) for key in ("X", "y", "masks"))
    optimum = float(arrays["outputs/optimal_value"])
    theirs = (jnp.asarray(arrays[f"outputs/{key}"]).T for key in "vw")
    of_theirs = convex_relu_objective(x, y, patterns, *theirs, beta, loss)
    np.testing.assert_allclose(of_theirs, optimum, rtol=GOLDEN)
    found = convex_relu(x, y, patterns, beta, loss=loss, rho=RHO[loss], steps=STEPS[loss])
    assert found.violation < 1e-6
    np.testing.assert_allclose(found.objective, optimum, rtol=OPTIMUM[loss])
    hidden, out = recover_network(found)
    of_network = network_objective(x, y, hidden, out, beta, loss)
    np.testing.assert_allclose(of_network, found.objective, rtol=OPTIMUM[loss])
    assert len(out) <= 2 * patterns.shape[1]
    predictions = jax.nn.relu(x @ hidden) @ out
    np.testing.assert_allclose(predictions, arrays["outputs/predictions"], atol=PREDICTIONS[loss])
    np.testing.assert_allclose(jnp.linalg.norm(hidden, axis=0), jnp.abs(out), rtol=1e-9)


RHO = {"squared": 0.1, "logistic": 0.02}
STEPS = {"squared": 5000, "logistic": 8000}
PREDICTIONS = {"squared": 1e-5, "logistic": 1e-3}


def test_published_progress(x64):
    """Our own ADMM of the reference: the objective after 10 and 50 steps at rho = 0.1."""
    golden = load("convex_relu-mse_small")
    x, y, patterns = (golden.arrays[f"inputs/{key}"] for key in ("X", "y", "masks"))
    for steps, value in ((10, 0.1968), (50, 0.0991)):
        found = convex_relu(x, y, patterns, golden.meta["beta"], rho=0.1, steps=steps)
        np.testing.assert_allclose(found.objective, value, atol=1e-4)


@pytest.mark.slow
def test_no_network_is_better():
    """All patterns of a line: descent from many starts stays above, and scaling is free."""
    t = np.linspace(-1, 1, 7)
    x, y = np.stack([t, np.ones(7)], 1), np.sin(3 * t)
    patterns = activation_patterns(jax.random.key(0), x, 500)
    found = convex_relu(x, y, patterns, 0.05, steps=3000)

    def objective(p):
        return network_objective(jnp.asarray(x), y, *p, 0.05, "squared")

    def descend(key):
        keys = jax.random.split(key)
        p = (jax.random.normal(keys[0], (2, 30)), jax.random.normal(keys[1], (30,)) / 3)
        step = lambda _, p: jax.tree.map(lambda a, g: a - 0.01 * g, p, jax.grad(objective)(p))  # noqa: E731
        return objective(jax.lax.fori_loop(0, 3000, step, p))

    reached = jax.jit(jax.vmap(descend))(jax.random.split(jax.random.key(1), 4))
    assert jnp.all(reached > found.objective * (1 - 1e-3))
    assert jnp.min(reached) < found.objective * 1.2


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match=r"x \(n, d\), y \(n,\) and patterns \(n, P\), got"):
        convex_relu(jnp.ones((3, 2)), jnp.ones(3), jnp.ones((2, 3)), 0.1)
    with pytest.raises(ValueError, match="loss must be one of squared, logistic"):
        convex_relu(jnp.ones((3, 2)), jnp.ones(3), jnp.ones((3, 1)), 0.1, loss="hinge")
