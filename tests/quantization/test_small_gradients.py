"""Where stored moments fail: small gradients beside large ones, and gradients that stop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structured as oxs

RATE = 1e-3
STORED = {
    "32 bits": lambda inner: inner,
    "8 bits": lambda inner: oxs.quantized(inner, oxs.Dynamic(), min_size=0),
    "4 bits": lambda inner: oxs.quantized(inner, oxs.Dynamic(4, block=128), min_size=0),
    "8 bits as published": lambda inner: oxs.quantized(
        inner, oxs.Dynamic(published=True), min_size=0
    ),
}


def path(stored, shape, gradient, steps):
    """Parameters after every step of Adam, in steps of its learning rate."""
    tx = STORED[stored](optax.adam(RATE, b2=0.999))

    @jax.jit
    def run():
        start = jnp.zeros(shape)

        def body(carry, t):
            current, state = carry
            updates, state = tx.update(gradient(t), state, current)
            current = optax.apply_updates(current, updates)
            return (current, state), current

        return jax.lax.scan(body, (start, tx.init(start)), jnp.arange(steps))[1]

    return np.asarray(run()) / RATE


TOKENS, WIDTH = 8, 64  # four tokens to a block


@functools.cache
def largest_step_of_an_embedding(stored):
    """Half of the tokens are rare: a small gradient at every 16th step, 500 times smaller."""

    def gradient(t):
        key = jax.random.fold_in(jax.random.key(0), t)
        seen = (jnp.arange(TOKENS) % 2 == 0) | (t % 16 == jnp.arange(TOKENS))
        size = jnp.where(jnp.arange(TOKENS) % 2 == 0, 1.0, 2e-3)
        return jax.random.normal(key, (TOKENS, WIDTH)) * (seen * size)[:, None]

    steps = np.diff(path(stored, (TOKENS, WIDTH), gradient, 2_000), axis=0)
    return np.abs(steps).max()


@pytest.mark.parametrize("stored", ["8 bits", "4 bits"])
def test_rare_tokens_do_not_blow_up(stored):
    assert largest_step_of_an_embedding(stored) <= 1.5 * largest_step_of_an_embedding("32 bits")


def test_rare_tokens_blow_up_where_small_second_moments_become_zero():
    published = largest_step_of_an_embedding("8 bits as published")
    assert published >= 5 * largest_step_of_an_embedding("32 bits")


STOP, STEPS = 20, 520
SIZES = (0.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@functools.cache
def movement_after_the_gradient_stopped(stored):
    """The largest, for coordinates of each size, beside others whose gradients go on."""
    rows, width = 16, 256
    sizes = jnp.ones(width).at[: len(SIZES)].set(jnp.array(SIZES))

    def gradient(t):
        normal = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), (rows, width))
        stopped = (jnp.arange(width) < len(SIZES)) & (t >= STOP)
        return jnp.where(stopped, 0, normal * sizes)

    points = path(stored, (rows, width), gradient, STEPS)[STOP - 1 :, :, : len(SIZES)]
    return np.abs(points - points[0]).max((0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED)
def test_what_never_had_a_gradient_never_moves(stored):
    assert movement_after_the_gradient_stopped(stored)[0] == 0


@pytest.mark.parametrize("stored", ["8 bits", "4 bits"])
def test_what_has_no_gradient_any_more_stops(stored):
    """A first moment that decays must not stay at a code for ever."""
    plain = movement_after_the_gradient_stopped("32 bits")
    assert movement_after_the_gradient_stopped(stored).max() <= 3 * plain.max()
