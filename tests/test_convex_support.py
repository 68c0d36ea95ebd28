"""Logistic regression on digits: training reaches the support of the convex optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from tolerances import OPTIMUM

import optax_structured as oxs

STRENGTH = 4e-3
STRUCTURE = oxs.rules(("bias", None), default=oxs.GroupLasso(group_axis=-2))
EPOCHS, BATCH = 90, 64


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return images / 16.0, labels


def loss(params, images, labels):
    logits = images @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def optimum():
    """By accelerated proximal gradient in float64 on all data, numpy alone, restarted."""
    x, y = digits()
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)  # the last row of w is the bias
    one_hot = np.eye(10)[y]
    step = 2 * len(x) / np.linalg.norm(x, 2) ** 2
    threshold = STRENGTH * np.sqrt(10) * np.append(np.ones(64), 0)[:, None]

    def gradient(w):
        logits = x @ w
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return x.T @ (p / p.sum(axis=1, keepdims=True) - one_hot) / len(x)

    def forward_backward(z):
        u = z - step * gradient(z)
        norm = np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-300)
        return u * np.maximum(0, 1 - step * threshold / norm)

    w = z = np.zeros((65, 10))
    t = 1.0
    for _ in range(20_000):
        new = forward_backward(z)
        if np.sum((z - new) * (new - w)) > 0:  # the momentum points uphill
            t, z, new = 1.0, w, forward_backward(w)
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        z = new + (t - 1) / t_new * (new - w)
        moved, w, t = np.abs(new - w).max(), new, t_new
        if moved < 1e-15:
            break
    residual = np.linalg.norm(w - forward_backward(w)) / step
    slack = threshold[:-1, 0] - np.linalg.norm(gradient(w)[:-1], axis=1)
    return w, residual, slack


def train(optimizer, seed):
    x, y = (jnp.asarray(a) for a in digits())
    x = x.astype(jnp.float32)
    rng = np.random.default_rng(seed)
    steps = len(x) // BATCH
    order = np.concatenate([rng.permutation(len(x))[: steps * BATCH] for _ in range(EPOCHS)])
    params = {
        "kernel": jnp.asarray(rng.normal(size=(64, 10)) * 0.1, jnp.float32),
        "bias": jnp.zeros(10),
    }

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.any(params["kernel"] != 0.0, axis=1)

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)

    (params, _), supports = run(params, jnp.asarray(order.reshape(-1, BATCH)))
    return params, np.asarray(supports)


def staged(recipe, learning_rate, momentum, **extra):
    per_epoch = len(digits()[0]) // BATCH
    stages = oxs.Stages([30 * per_epoch, 60 * per_epoch])
    optimizer = recipe(
        stages.decay(learning_rate),
        STRUCTURE,
        STRENGTH,
        momentum=stages.momentum(momentum),
        **{name: stages.decay(value) for name, value in extra.items()},
    )
    return oxs.restart_at(optimizer, stages.milestones)


def test_the_optimum_is_one():
    w, residual, slack = optimum()
    assert residual < OPTIMUM
    alive = np.any(w[:-1] != 0, axis=1)
    assert 15 < alive.sum() < 50
    assert slack[~alive].min() > 1e-5  # no dead group is on its threshold


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: staged(oxs.ramda, 0.1, 0.9, eps=1e-6), id="ramda"),
        pytest.param(lambda: staged(oxs.rmda, 10.0, 0.9), id="rmda"),
    ],
)
def test_the_support_is_that_of_the_optimum(make, seed):
    _, supports = train(make(), seed)
    expected = np.any(optimum()[0][:-1] != 0, axis=1)
    last_epoch = supports[-(len(digits()[0]) // BATCH) :]
    np.testing.assert_array_equal(last_epoch, np.broadcast_to(expected, last_epoch.shape))
