"""Weight normalisation as an optimizer: the chain rule, the gauge, rows of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import normal
from tolerances import reordered, rounding

from optax_structured.transforms import lookahead_weight_norm, weight_normalized
from optax_structured.trees import Axes, rules

W = normal("weights", (5, 3))
TARGET = normal("target", (5, 3))


def loss(w):
    return jnp.sum((w - TARGET) ** 4)


GRADIENT = jax.grad(loss)


def norms(w, axis=-1):
    return jnp.linalg.norm(w, axis=axis)


def run(tx, w, steps, gradient=GRADIENT):
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(gradient(w), state, w)
        w = w + updates
    return w, state


def test_classical_form_is_gradient_descent_on_v_and_g(x64):
    w = jnp.asarray(normal("weights", (5, 3)), jnp.float64)
    target = jnp.asarray(TARGET, jnp.float64)
    value = lambda w: jnp.sum((w - target) ** 4)  # noqa: E731
    of_parts = jax.grad(lambda p: value(p["g"][:, None] * p["v"] / norms(p["v"])[:, None]))
    parts = {"g": norms(w), "v": w}
    for _ in range(5):
        parts = jax.tree.map(lambda p, g: p - 0.01 * g, parts, of_parts(parts))
    expected = parts["g"][:, None] * parts["v"] / norms(parts["v"])[:, None]
    tx = weight_normalized(optax.sgd(0.01), optax.sgd(0.01), classical=True)
    got, state = run(tx, w, 5, jax.grad(value))
    np.testing.assert_allclose(got, expected, rtol=reordered(jnp.float64))
    np.testing.assert_allclose(state.lengths[""], norms(parts["v"]), rtol=reordered(jnp.float64))


def test_first_step_does_not_depend_on_the_gauge():
    once = [
        run(weight_normalized(optax.sgd(0.01), optax.sgd(0.01), classical=c), W, 1)[0]
        for c in (False, True)
    ]
    np.testing.assert_allclose(*once, rtol=reordered(jnp.float32))


def test_the_direction_sees_what_is_orthogonal_to_the_row():
    seen = []

    def update(updates, state, params=None):
        seen.append(updates)
        return updates, state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = weight_normalized(spy, optax.sgd(0.1))
    tx.update(GRADIENT(W), tx.init(W), W)
    assert jnp.max(jnp.abs(jnp.sum(seen[0] * W, -1))) < 1e-5 * jnp.max(jnp.abs(seen[0]))


def test_lengths_change_by_the_magnitude_alone():
    still, _ = run(weight_normalized(optax.sgd(0.05), optax.sgd(0.0)), W, 3)
    np.testing.assert_allclose(norms(still), norms(W), rtol=reordered(jnp.float32))
    turned, _ = run(weight_normalized(optax.sgd(0.0), optax.sgd(0.01)), W, 3)
    directions = [w / norms(w)[:, None] for w in (turned, W)]
    np.testing.assert_allclose(*directions, atol=reordered(jnp.float32))


def test_rows_of_other_layouts():
    """A kernel (inputs, outputs) is its transpose's transpose; a stack is matrix by matrix."""
    tx = weight_normalized(optax.sgd(0.01), optax.sgd(0.01))
    expected, _ = run(tx, W, 3)
    flipped = weight_normalized(optax.sgd(0.01), optax.sgd(0.01), Axes(rows=-1, cols=-2))
    got, _ = run(flipped, W.T, 3, lambda w: GRADIENT(w.T).T)
    np.testing.assert_allclose(got.T, expected, rtol=reordered(jnp.float32))
    stacked, _ = run(tx, jnp.stack([W, W]), 3, jax.vmap(GRADIENT))
    np.testing.assert_allclose(stacked[1], expected, rtol=reordered(jnp.float32))


def test_leaves_that_are_not_normalised_take_the_plain_update():
    params = {"kernel": W, "bias": W[0], "embed": W}
    where = rules(("embed", None), default=Axes())
    tx = weight_normalized(optax.sgd(0.1), optax.sgd(0.1), where)
    updates, _ = tx.update(params, tx.init(params), params)
    for name in ("bias", "embed"):
        np.testing.assert_allclose(updates[name], -0.1 * params[name], rtol=1e-6)
    assert jnp.max(jnp.abs(updates["kernel"] + 0.1 * W)) < 1e-6  # a radial gradient: lengths only


@pytest.mark.parametrize("classical", [False, True])
def test_rows_of_zeros_take_the_plain_step(classical):
    w = W.at[1].set(0.0)
    tx = weight_normalized(optax.sgd(0.1), optax.sgd(0.1), classical=classical)
    updates, state = tx.update(jnp.ones_like(w), tx.init(w), w)
    np.testing.assert_allclose(updates[1], -0.1, rtol=1e-6)
    after = w + updates
    updates, _ = tx.update(jnp.ones_like(w), state, after)
    assert jnp.all(jnp.isfinite(updates))


def test_lookahead_follows_the_direction():
    """v is what the direction would make of the same gradients by itself."""
    grads = [normal(i, (5, 3)) for i in range(4)]
    tx, plain = lookahead_weight_norm(optax.adam(0.1), optax.adam(0.1)), optax.adam(0.1)
    w, v, state, plain_state = W, W, tx.init(W), plain.init(W)
    for g in grads:
        updates, state = tx.update(g, state, w)
        w = w + updates
        updates, plain_state = plain.update(g, plain_state, v)
        v = v + updates
    np.testing.assert_allclose(state.v, v, rtol=rounding(jnp.float32), atol=1e-6)


def test_lookahead_without_nan_for_zeros_and_with_leaves_of_any_shape():
    params = {"zeros": jnp.zeros((2, 3)), "bias": jnp.zeros(3), "gain": jnp.zeros(()), "w": W}
    tx = lookahead_weight_norm(optax.adam(0.1), optax.adam(0.1))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(jnp.all(jnp.isfinite(p) & (p != 0)) for p in jax.tree.leaves(params))


@pytest.mark.parametrize("make", [weight_normalized, lookahead_weight_norm])
def test_needs_the_parameters(make):
    tx = make(optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx.update(W, tx.init(W))
