"""Particle flow: dynamics without width, and the proximal step of a product of norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_structured.contrib.solvers import (
    Particles,
    particle_gradient_flow,
    prox_product_of_norms,
)

X = jax.random.normal(jax.random.key(7), (20, 3))
Y = jnp.sin(X[:, 0]) + jnp.abs(X[:, 1])


def predict(p):
    return jax.nn.relu(X @ p.position.T) @ p.weight / len(p.weight)


def risk(p):
    return 0.5 * jnp.mean((predict(p) - Y) ** 2)


def draw(m, seed=0):
    directions = jax.random.normal(jax.random.key(seed), (m, 3))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    return Particles(jnp.where(jnp.arange(m) % 2, 1.0, -1.0), directions)


def run(p, optimizer, steps=60):
    def step(carry, _):
        p, state = carry
        updates, state = optimizer.update(jax.grad(risk)(p), state, p)
        return (optax.apply_updates(p, updates), state), predict(p)

    return jax.lax.scan(step, (p, optimizer.init(p)), length=steps)


def test_splitting_a_particle_changes_nothing():
    p = draw(8)
    twice = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), p)
    for strength in (0.0, 0.1):
        optimizer = particle_gradient_flow(0.3, strength)
        np.testing.assert_allclose(run(p, optimizer)[1], run(twice, optimizer)[1], atol=1e-4)


@pytest.mark.slow
def test_width_does_not_matter_and_without_its_factor_it_does():
    narrow, wide = draw(256, 1), draw(1024, 2)
    flow = particle_gradient_flow(0.3)
    of_flow = [run(p, flow, 40)[1][-1] for p in (narrow, wide)]
    of_sgd = [run(p, optax.sgd(0.3), 40)[1][-1] for p in (narrow, wide)]
    moved = jnp.linalg.norm(of_flow[1] - predict(wide))
    assert jnp.linalg.norm(of_flow[0] - of_flow[1]) < 0.2 * moved
    assert jnp.linalg.norm(of_sgd[1] - predict(wide)) < 0.02 * moved
    (p, _), _ = run(narrow, optax.sgd(0.3 * 256), 40)
    np.testing.assert_allclose(predict(p), predict(run(narrow, flow, 40)[0][0]), rtol=1e-3)


def test_balance_is_conserved_by_short_steps():
    p = draw(16)
    balance = lambda p: p.weight**2 - jnp.sum(p.position**2, 1)  # noqa: E731
    (after, _), _ = run(p, particle_gradient_flow(1e-3), 200)
    change = jnp.abs(p.weight - after.weight).max()
    assert jnp.abs(balance(after) - balance(p)).max() < 0.05 * change


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
def test_prox_is_the_least_on_a_grid(strength):
    """The minimum over both norms, by search."""
    a, w = np.array([1.0, 0.2, -3.0, 0.0]), np.array([0.8, 2.0, 0.5, 1.0])
    got = prox_product_of_norms(Particles(jnp.asarray(a), jnp.asarray(np.c_[w, 0 * w])), strength)
    grid = np.linspace(0, 4, 801)
    for k in range(4):
        near = (grid[:, None] - abs(a[k])) ** 2 + (grid - w[k]) ** 2
        value = near / 2 + strength * grid[:, None] * grid
        i, j = np.unravel_index(np.argmin(value), value.shape)
        np.testing.assert_allclose(got.weight[k], np.sign(a[k]) * grid[i], atol=6e-3)
        np.testing.assert_allclose(got.position[k], [grid[j], 0], atol=6e-3)


def test_regularisation_ends_at_exact_zeros():
    (p, _), _ = run(draw(64), particle_gradient_flow(0.3, 0.05), 400)
    share = jnp.mean(p.weight == 0.0)
    assert 0.1 < share < 1
    assert risk(p) < 0.5 * risk(draw(64))


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match=r"learning_rate \* strength must be in \[0, 1\), got 2"):
        particle_gradient_flow(1.0, 2.0)
    with pytest.raises(ValueError, match=r"moves Particles\(weight, position\)"):
        particle_gradient_flow(1.0).init({"w": jnp.ones(3)})
    p = draw(4)
    with pytest.raises(ValueError, match="needs the parameters"):
        particle_gradient_flow(1.0).update(p, particle_gradient_flow(1.0).init(p))
