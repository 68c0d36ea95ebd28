"""RAMDA and RMDA hold the exact support of a convex optimum; the baselines do not.

Group-lasso least squares with 17 of 40 groups active. The protocol is that of the golden file:
stages with restarts, mini-batches, and the support of W looked at after every step of the last five
epochs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load

import optax_structured as oxs

SEEDS = 3
LAST_EPOCHS = 5
GROUPS = oxs.GroupLasso(group_axis=1)

golden = load("identification-lsq")
protocol = golden.meta["protocol"]
X, Y, W_STAR = (golden.arrays[key] for key in ("X", "Y", "W_star"))
STRENGTH = golden.meta["lambda_"]
STEPS_PER_EPOCH = len(X) // protocol["batch_size"]
STAGES = oxs.Stages(
    [epoch * STEPS_PER_EPOCH for epoch in protocol["milestones_epochs"]], gamma=protocol["gamma"]
)
PUBLISHED = {
    name: result["hyperparameters"]
    for name, result in golden.meta["results_of_authors_code"].items()
}


def ramda():
    h = PUBLISHED["RAMDA"]
    recipe = oxs.ramda(
        STAGES.decay(h["lr"]),
        GROUPS,
        STRENGTH,
        momentum=STAGES.momentum(1 - h["momentum"]),
        eps=STAGES.decay(h["epsilon"]),
        keep_point=True,
    )
    return oxs.restart_at(recipe, STAGES.milestones)


def rmda():
    h = PUBLISHED["RMDA"]
    recipe = oxs.rmda(
        STAGES.decay(h["lr"]),
        GROUPS,
        STRENGTH,
        momentum=STAGES.momentum(1 - h["momentum"]),
        keep_point=True,
    )
    return oxs.restart_at(recipe, STAGES.milestones)


def prox_sgd():
    h = PUBLISHED["ProxSGD"]
    return oxs.prox_sgd(STAGES.decay(h["lr"]), GROUPS, STRENGTH, momentum=1 - h["momentum"])


def prox_adam():
    h = PUBLISHED["ProxAdamW"]
    b1, b2 = h["betas"]
    return oxs.prox_adam(STAGES.decay(h["lr"]), GROUPS, STRENGTH, b1=b1, b2=b2, eps=h["epsilon"])


@functools.cache
def trained(recipe, dtype):
    """(seeds, steps, groups) supports and final parameters (seeds, 8, 40)."""
    tx = recipe()
    x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)

    def loss(w, batch):
        return 0.5 * jnp.mean(jnp.sum((x[batch] @ w.T - y[batch]) ** 2, axis=1))

    def step(carry, batch):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w, batch), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), GROUPS.support(w)

    @jax.jit
    @jax.vmap
    def train(w, batches):
        (w, _), supports = jax.lax.scan(step, (w, tx.init(w)), batches)
        return supports[-LAST_EPOCHS * STEPS_PER_EPOCH :], w

    starts, batches = [], []
    for seed in range(SEEDS):
        generator = np.random.default_rng(seed)
        starts.append(0.01 * generator.standard_normal(W_STAR.shape))
        epochs = [generator.permutation(len(X)) for _ in range(protocol["epochs"])]
        batches.append(np.concatenate(epochs).reshape(-1, protocol["batch_size"]))
    supports, w = train(jnp.asarray(np.stack(starts), dtype), jnp.asarray(np.stack(batches)))
    return np.asarray(supports), np.asarray(w, np.float64)


def objective(w):
    smooth = 0.5 * np.sum((X.astype(float) @ w.T - Y) ** 2) / len(X)
    return smooth + STRENGTH * np.sqrt(len(w)) * np.sum(np.linalg.norm(w, axis=0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("recipe", [ramda, rmda])
def test_dual_averaging_holds_the_optimal_support(recipe, dtype):
    supports, w = trained(recipe, dtype)
    assert supports.shape == (SEEDS, LAST_EPOCHS * STEPS_PER_EPOCH, W_STAR.shape[1])
    np.testing.assert_array_equal(
        supports, np.broadcast_to(golden.arrays["support"], supports.shape)
    )
    for member in w:
        assert 0 <= objective(member) - golden.meta["F_star"] < 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("recipe", [prox_sgd, prox_adam])
def test_baselines_do_not(recipe):
    """As in the published measurements: about a dozen false groups, never the support."""
    supports, w = trained(recipe, "float32")
    wrong = supports != golden.arrays["support"]
    assert not np.any(np.all(~wrong, axis=-1))
    assert np.all(np.mean(np.sum(wrong, axis=-1), axis=-1) > 5)
    for member in w:
        assert 0 <= objective(member) - golden.meta["F_star"] < 1e-3


def test_support_of_the_golden_optimum():
    assert abs(objective(W_STAR) - golden.meta["F_star"]) < 1e-9 * golden.meta["F_star"]
    np.testing.assert_array_equal(GROUPS.support(W_STAR), golden.arrays["support"])
