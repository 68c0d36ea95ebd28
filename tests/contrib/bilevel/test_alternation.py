"""Alternating descent: its two orders, against derivatives written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_structured.contrib.bilevel import alternation

A, B = jax.random.normal(jax.random.key(0), (2, 3, 3))


def upper(x, y, batch):
    return jnp.sum((y - batch) ** 2) + jnp.sum(jnp.cos(x)) + x @ A @ y


def lower(x, y, batch):
    return jnp.sum((A @ y - batch) ** 2) + x @ B @ y + jnp.sum(x**2 * y**2)


X, Y = jax.random.normal(jax.random.key(1), (2, 3))
BATCHES = jax.random.normal(jax.random.key(2), (2, 3))
dx_upper, dy_upper = (jax.grad(upper, argnums=i) for i in (0, 1))
dy_lower = jax.grad(lower, argnums=1)


def one_step(**how):
    solver = alternation(upper, lower, optax.sgd(0.1), optax.sgd(0.05), **how)
    x, y, _ = jax.jit(solver.update)(X, Y, solver.init(X, Y), *BATCHES)
    return x, y


def test_first_order_uses_the_new_x_for_y():
    x, y = one_step()
    np.testing.assert_allclose(x, X - 0.1 * dx_upper(X, Y, BATCHES[0]), rtol=1e-5)
    np.testing.assert_allclose(y, Y - 0.05 * dy_lower(x, Y, BATCHES[1]), rtol=1e-5)


def test_unrolled_is_the_published_second_order(x64):
    """There the product is a finite difference of radius 1e-2 / |v|."""
    x0, y0, (validation, training) = (np.float64(a) for a in (X, Y, BATCHES))
    rate = 0.05
    ahead = y0 - rate * dy_lower(x0, y0, training)
    v = dy_upper(x0, ahead, validation)
    dx_lower = jax.grad(lower, argnums=0)

    def published(radius):
        e = radius / jnp.linalg.norm(v)
        mixed = (dx_lower(x0, y0 + e * v, training) - dx_lower(x0, y0 - e * v, training)) / (2 * e)
        return dx_upper(x0, ahead, validation) - rate * mixed

    solver = alternation(upper, lower, optax.sgd(1.0), optax.sgd(rate), unroll=rate)
    x, _, _ = solver.update(x0, y0, solver.init(x0, y0), validation, training)
    # x enters the lower level times powers of y up to 2, where central differences are exact.
    np.testing.assert_allclose(x0 - x, published(1e-2), rtol=1e-9)


def test_unroll_zero_and_schedules():
    x, y = one_step(unroll=0.0)
    np.testing.assert_array_equal(x, one_step()[0])
    scheduled = one_step(unroll=optax.constant_schedule(0.05))
    np.testing.assert_allclose(scheduled[0], one_step(unroll=0.05)[0], rtol=1e-6)
    assert not np.allclose(scheduled[0], x)
    zero = one_step(unroll=optax.constant_schedule(0.0))
    np.testing.assert_allclose(zero[0], x, rtol=1e-6)


def test_a_hyperparameter_that_acts_through_the_lower_level_only():
    """A ridge: x has no direct influence on the validation loss, so that first order is blind."""

    def ridge(x, y, _):
        return 0.5 * jnp.sum((y - 2) ** 2) + 0.5 * jnp.exp(x) * jnp.sum(y**2)

    def validation(x, y, _):
        return jnp.sum((y - 1) ** 2)

    def end(unroll):
        solver = alternation(validation, ridge, optax.sgd(0.3), optax.sgd(0.2), unroll=unroll)
        start = (jnp.array(-2.0), jnp.zeros(2))

        def step(carry, _):
            return solver.update(*carry), None

        return jax.lax.scan(step, (*start, solver.init(*start)), length=400)[0][:2]

    blind, _ = end(0.0)
    seeing, y = end(0.2)
    assert blind == -2.0
    np.testing.assert_allclose(seeing, 0.0, atol=1e-2)  # 2 / (1 + e^0) = 1
    np.testing.assert_allclose(y, 1.0, atol=1e-2)


def test_vmap_and_optimizers_with_state():
    solver = alternation(upper, lower, optax.adam(0.1), optax.sgd(0.05, momentum=0.9))
    xs, ys = jnp.stack([X, -X]), jnp.stack([Y, Y])
    states = jax.vmap(solver.init)(xs, ys)
    update = jax.vmap(
        functools.partial(solver.update, upper_batch=BATCHES[0], lower_batch=BATCHES[1])
    )
    x, _, states = update(xs, ys, states)
    alone, _, _ = solver.update(-X, Y, solver.init(-X, Y), *BATCHES)
    np.testing.assert_allclose(x[1], alone, rtol=1e-5)
    np.testing.assert_array_equal(states.clock.count, 1)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="unroll must be a finite number of at least 0"):
        alternation(upper, lower, optax.sgd(0.1), optax.sgd(0.1), unroll=-1.0)
