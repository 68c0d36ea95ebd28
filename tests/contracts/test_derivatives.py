"""Derivatives through steps, as learned learning rates need them; a basis is a constant."""

import jax
import jax.numpy as jnp
import optax
import pytest
from recipes_table import every_case, gradients, params

import optax_structured as oxs

ROUNDED = {"q_galore_lazy_on_grid"}  # weights on a grid have no derivative
LOOPS = {"ramda_inexact", "ramda_nuclear_inexact"}  # until a tolerance is met: forward mode only


# Their bases follow the weights, and so the rate, of which differences know and derivatives do not.
TURNING = {"grad_norm_lorp", "grad_norm_lorp_8bit"}


def loss(build, learning_rate, steps=3):
    tx, current = build(learning_rate), params("float64")
    state = tx.init(current)
    for t in range(steps):
        updates, state = tx.update(gradients(t, "float64"), state, current)
        current = optax.apply_updates(current, updates)
    return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(current))


def check(build, derivative):
    f = jax.jit(lambda rate: loss(build, rate))
    rate, h = 0.05, 1e-5
    expected = (f(rate + h) - f(rate - h)) / (2 * h)
    got = jax.jit(derivative(lambda rate: loss(build, rate)))(rate)
    assert abs(got - expected) <= 1e-5 * max(abs(expected), 1)


@pytest.mark.usefixtures("x64")
@every_case
def test_the_derivative_by_the_learning_rate(case):
    if case.name in ROUNDED or "learning_rate" not in case.scalars or case.coupled:
        pytest.skip("no derivative, or no learning rate")
    if case.name in TURNING:
        slope = jax.jit(jax.grad(lambda rate: loss(lambda x: case.build(learning_rate=x), rate)))
        assert jnp.isfinite(slope(0.05)) and slope(0.05) != 0
        return
    derivative = jax.jacfwd if case.name in LOOPS else jax.grad
    check(lambda rate: case.build(learning_rate=rate), derivative)


@pytest.mark.usefixtures("x64")
def test_through_accumulated_steps():
    check(lambda rate: oxs.accumulate(optax.adam(rate), 2), jax.grad)
