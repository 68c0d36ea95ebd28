"""STORM: its recursion, its limits, and a gradient tree that no wrapper masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import SHAPES, assert_close, assert_equal, normal_tree, params
from tolerances import reordered

import optax_structured as oxs

STEPS = 4
OLD = [normal_tree(("old", i)) for i in range(STEPS)]
NEW = [normal_tree(("new", i)) for i in range(STEPS)]


def run(tx, new=NEW, old=OLD):
    """The update of every step."""
    update, out = jax.jit(tx.update), []
    start = jax.tree.map(jnp.zeros_like, new[0])
    state = tx.init(start)
    for g, h in zip(new, old, strict=True):
        updates, state = update(g, state, start, grads_prev=h)
        out.append(updates)
    return out


def expected(betas, new=NEW, old=OLD):
    """The published recursion, written out."""
    z, out = new[0], [new[0]]
    for beta, g, h in zip(betas[1:], new[1:], old[1:], strict=True):
        z = jax.tree.map(lambda z, g, h, b=beta: (1 - b) * (z - h) + g, z, g, h)
        out.append(z)
    return out


def test_recursion():
    assert_close(run(oxs.transforms.storm(0.3)), expected([0.3] * STEPS), reordered(jnp.float32))


def test_beta_one_is_identity():
    assert_equal(run(oxs.transforms.storm(1.0)), NEW)


def test_schedules_directly_and_injected():
    ramp = lambda count: 0.2 + 0.1 * jnp.asarray(count, float)  # noqa: E731
    want = expected([float(ramp(i)) for i in range(STEPS)])
    assert_close(run(oxs.transforms.storm(ramp)), want, reordered(jnp.float32))
    injected = optax.inject_hyperparams(oxs.transforms.storm)(beta=ramp)
    assert_close(run(injected), want, reordered(jnp.float32))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"dense": {"kernel": True, "bias": False}, "gain": True}),
        lambda tx: optax.partition(
            {"storm": tx, "plain": optax.identity()},
            {"dense": {"kernel": "storm", "bias": "plain"}, "gain": "storm"},
        ),
    ],
    ids=["masked", "partition"],
)
def test_wrappers_that_cut_holes(wrap):
    got, want = run(wrap(oxs.transforms.storm(0.3)))[-1], expected([0.3] * STEPS)[-1]
    assert_equal(got["dense"]["bias"], NEW[-1]["dense"]["bias"])
    assert_close(got["dense"]["kernel"], want["dense"]["kernel"], reordered(jnp.float32))


def test_without_noise_it_is_the_gradient():
    grad = jax.grad(lambda w: jnp.sum(jnp.square(w - 1) * jnp.arange(1.0, 4.0)))
    tx = oxs.transforms.storm(0.1)
    previous = current = jnp.zeros(3)
    state = tx.init(current)
    for _ in range(10):
        z, state = tx.update(grad(current), state, grads_prev=grad(previous))
        np.testing.assert_allclose(z, grad(current), rtol=1e-5, atol=1e-5)
        previous, current = current, current - 0.05 * z


def test_variance_falls_below_that_of_momentum():
    """Least squares from four rows a step: 150 estimates on the way, against the full gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((256, 8)), jnp.float32)
    y = x @ jnp.ones(8) + jnp.asarray(rng.standard_normal(256), jnp.float32)
    rows = jnp.asarray(rng.integers(256, size=(200, 4)))
    grad = jax.grad(lambda w, x, y: 0.5 * jnp.mean(jnp.square(x @ w - y)))

    def errors(tx):
        def step(carry, row):
            w, previous, state = carry
            batch = (x[row], y[row])
            z, state = tx.update(grad(w, *batch), state, grads_prev=grad(previous, *batch))
            error = jnp.sum(jnp.square(z - grad(w, x, y)))
            return (w - 0.01 * z, w, state), error

        start = jnp.zeros(8)
        return jax.lax.scan(step, (start, start, tx.init(start)), rows)[1][50:].mean()

    momentum = optax.with_extra_args_support(optax.ema(0.98, debias=True))
    assert errors(oxs.transforms.storm(0.02)) < 0.4 * errors(momentum)


def test_half_precision_gradients_accumulate_in_float32():
    half = lambda trees: [jax.tree.map(lambda x: x.astype(jnp.bfloat16), t) for t in trees]  # noqa: E731
    tx = oxs.transforms.storm(0.3)
    state = tx.init(params(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(state.estimate)} == {jnp.dtype("float32")}
    got = run(tx, half(NEW), half(OLD))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    assert_close(got, expected([0.3] * STEPS), reordered(jnp.bfloat16))


def test_vmap():
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    tx = oxs.transforms.storm(0.3)
    states = jax.vmap(tx.init)(stack([NEW[0]] * STEPS))
    update = jax.vmap(lambda g, s, h: tx.update(g, s, grads_prev=h))
    for _ in range(2):
        got, states = update(stack(NEW), states, stack(OLD))
    for i in range(STEPS):
        want = run(tx, [NEW[i]] * 2, [OLD[i]] * 2)[-1]
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), want, reordered(jnp.float32))


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\] or a schedule, got 1.5"):
        oxs.transforms.storm(1.5)
    tx = oxs.transforms.storm(0.5)
    with pytest.raises(ValueError, match="grads_prev=jax.grad"):
        tx.update(NEW[0], tx.init(params(shapes=SHAPES)))
