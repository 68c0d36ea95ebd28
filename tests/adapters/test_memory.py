"""What applying an adapter costs in temporaries: the three ways, with and without a scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_structured.adapters import LoRA, attach, init, merge, sub

DEPTH, WIDTH, BATCH = 12, 256, 16
WEIGHTS = DEPTH * WIDTH * WIDTH * 4


def stack():
    return {"layers": {"w": 0.05 * jax.random.normal(jax.random.key(0), (DEPTH, WIDTH, WIDTH))}}


def temporaries(loss, *args):
    step = jax.jit(jax.grad(loss, argnums=1))
    return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


def scanned(params, x):
    """Layers under scan and remat: what is saved is their inputs alone."""

    def body(x, layer):
        return jnp.tanh(jnp.dot(x, layer["w"])), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, params["layers"])[0])


@pytest.mark.slow
def test_merging_outside_a_scan_copies_the_weights_twice_and_attaching_does_not():
    params, x = stack(), jnp.ones((BATCH, WIDTH))
    adapter = init(jax.random.key(1), params, LoRA(4))
    outside = temporaries(lambda p, ad, x: scanned(merge(p, ad), x), params, adapter, x)
    attached = temporaries(lambda p, ad, x: scanned(attach(p, ad), x), params, adapter, x)
    assert outside >= 2 * WEIGHTS
    # One merged layer and one gradient of it at a time, each a twelfth of the weights.
    assert attached <= 0.3 * WEIGHTS
    # What no adapter can do without: the frozen forward pass, and the gradient of its input.
    step = jax.jit(jax.grad(scanned, argnums=1)).lower(params, x).compile()
    assert attached <= 1.1 * step.memory_analysis().temp_size_in_bytes

    def inside(params, adapter, x):
        def body(x, layer):
            weights, own = layer
            return jnp.tanh(jnp.dot(x, merge(weights, own)["w"])), None

        layers = (params["layers"], sub(adapter, "layers"))
        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, layers)[0])

    assert temporaries(inside, params, adapter, x) <= 0.3 * WEIGHTS
    for loss in (inside, lambda p, ad, x: scanned(attach(p, ad), x)):
        got = jax.grad(loss, argnums=1)(params, adapter, x)["layers/w"].b
        want = jax.grad(lambda p, ad, x: scanned(merge(p, ad), x), argnums=1)(params, adapter, x)
        np.testing.assert_allclose(
            got, want["layers/w"].b, rtol=0, atol=1e-5 * jnp.max(jnp.abs(got))
        )


def test_merging_unrolled_layers_costs_a_copy_of_the_weights():
    params = {str(i): 0.05 * jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) for i in range(4)}
    adapter = init(jax.random.key(1), params, LoRA(4))
    x = jnp.ones((BATCH, WIDTH))

    def loss(params, x):
        return jnp.sum(functools.reduce(lambda x, i: jnp.tanh(x @ params[i]), sorted(params), x))

    def branch(params, adapter, x):
        for i in sorted(params):
            pair = adapter[i]
            x = jnp.tanh(x @ params[i] + pair.scale * (x @ pair.a.T) @ pair.b.T)
        return jnp.sum(x)

    merged = temporaries(lambda p, ad, x: loss(merge(p, ad), x), params, adapter, x)
    factored = temporaries(branch, params, adapter, x)
    weights = 4 * WIDTH * WIDTH * 4
    assert merged >= weights
    assert factored <= 0.5 * weights
