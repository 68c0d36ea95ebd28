"""DeltaProduct: the published recurrence with its gradients, its chunks, and what one step does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import load, names
from tolerances import GOLDEN, reordered, rounding

from optax_structured.contrib.layers import delta_product

ARGUMENTS = ("q", "k", "v", "beta", "g")


def heads_first(golden):
    """(B, T, H, ...) to (B, H, T, ...), and steps (B, T n_h, H, ...) to (B, H, T, n_h, ...)."""
    steps = golden.meta["shapes"]["n_h"]

    def turn(name, x):
        x = np.moveaxis(x, 2, 1)
        if name in ("k", "v", "beta"):
            x = x.reshape(*x.shape[:2], -1, steps, *x.shape[3:])
        return jnp.asarray(x)

    def part(key):
        return {k: x if k in ("h0", "h_T", "ct_h") else turn(k, x) for k, x in key.items()}

    return tuple(part(golden.leaves(key)) for key in ("in", "out", "grad"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", names("deltaproduct-"))
def test_golden(name, chunk_size):
    given, want, gradients = heads_first(load(name))
    arguments = {key: given[key] for key in (*ARGUMENTS, "h0") if key in given}

    def run(arguments):
        h0 = arguments.get("h0")
        rest = [arguments.get(key) for key in ARGUMENTS]
        return delta_product(*rest, initial_state=h0, scale=1.0, chunk_size=chunk_size)

    @jax.jit
    def all_of_it(arguments):
        found, pull = jax.vjp(run, arguments)
        return found, pull((given["ct_o"], given["ct_h"]))[0]

    found, pulled = all_of_it(arguments)
    for ours, key in zip(found, ("o", "h_T"), strict=True):
        np.testing.assert_allclose(ours, want[key], atol=GOLDEN, err_msg=key)
    assert pulled.keys() == gradients.keys()
    for key, ours in pulled.items():
        np.testing.assert_allclose(ours, gradients[key], atol=GOLDEN, err_msg=key)


def draw(steps=2, tokens=7, seed=0, dtype="float32"):
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (3, tokens, 4), dtype)
    k = jax.random.normal(keys[1], (3, tokens, steps, 4), dtype)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jax.random.normal(keys[2], (3, tokens, steps, 2), dtype)
    beta = 2 * jax.random.uniform(keys[3], (3, tokens, steps), dtype)
    return q, k, v, beta, -jax.random.uniform(keys[4], (3, tokens), dtype)


@pytest.mark.slow
def test_a_sequence_in_parts_is_the_whole():
    arguments = draw()
    whole, last = delta_product(*arguments, chunk_size=3)
    first, state = delta_product(*(a[:, :4] for a in arguments), chunk_size=3)
    second, state = delta_product(*(a[:, 4:] for a in arguments), initial_state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.slow
def test_no_rate_leaves_the_decay():
    q, k, v, beta, g = draw()
    start = jax.random.normal(jax.random.key(1), (3, 4, 2))
    run = functools.partial(delta_product, q, k, v, 0 * beta, g, initial_state=start)
    for chunk_size in (None, 4):
        state = run(chunk_size=chunk_size)[1]
        decayed = jnp.exp(g.sum(1))[:, None, None] * start
        np.testing.assert_allclose(state, decayed, rtol=rounding("float32"))


@pytest.mark.slow
def test_rate_one_overwrites():
    _, k, v, beta, _ = draw(steps=1)
    _, state = delta_product(k[:, :, 0], k, v, jnp.ones_like(beta))
    recalled = jnp.einsum("bkv,bk->bv", state, k[:, -1, 0])
    np.testing.assert_allclose(recalled, v[:, -1, 0], atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_two_reflections_are_a_rotation(chunk_size):
    """Keys at 45 degrees turn their plane by 90 degrees a token: back after four, not before."""
    keys = jnp.array([[1.0, 0.0], [0.5**0.5, 0.5**0.5]])

    def turned(tokens):
        k, beta = jnp.tile(keys, (tokens, 1, 1)), jnp.full((tokens, 2), 2.0)
        nothing, q = jnp.zeros((tokens, 2, 2)), jnp.zeros((tokens, 2))
        start = {"initial_state": jnp.eye(2), "chunk_size": chunk_size}
        return delta_product(q, k, nothing, beta, **start)[1]

    quarter = turned(1)
    np.testing.assert_allclose(quarter @ quarter, -jnp.eye(2), atol=1e-6)
    np.testing.assert_allclose(turned(4), jnp.eye(2), atol=1e-6)


@pytest.mark.slow
def test_transitions_do_not_expand():
    q, k, v, beta, _ = draw(steps=3)
    eye = jnp.broadcast_to(jnp.eye(4), (3, 4, 4))
    through = delta_product(q, k, jnp.zeros((3, 7, 3, 4)), beta, initial_state=eye)[1]
    assert jnp.linalg.norm(through, ord=2, axis=(-2, -1)).max() <= 1 + 1e-6


@pytest.mark.slow
def test_strong_decay_neither_overflows_nor_makes_nan():
    q, k, v, beta, g = draw(tokens=6)

    @jax.jit
    @jax.value_and_grad
    def total(g):
        return jnp.sum(delta_product(q, k, v, beta, g, chunk_size=6)[0])

    value, slope = total(200 * g - 100)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(slope))


@pytest.mark.slow
def test_half_precision_is_computed_in_float32():
    arguments = draw(dtype="bfloat16")
    outputs, state = delta_product(*arguments, chunk_size=4)
    wide = delta_product(*(a.astype(jnp.float32) for a in arguments))[0]
    assert outputs.dtype == state.dtype == jnp.float32
    np.testing.assert_allclose(outputs, wide, atol=reordered("float32"))


def test_mistakes_say_what_to_do():
    q, k, v, beta, g = draw()
    with pytest.raises(ValueError, match=r"beta has shape \(3, 7\); with q .* beta \(..., tokens"):
        delta_product(q, k, v, beta[..., 0], g)
    with pytest.raises(ValueError, match="chunk_size must be at least 1 token"):
        delta_product(q, k, v, beta, g, chunk_size=0)
