"""The network: causal, relative positions, and the leaves that low rank is for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import reordered

from optax_structured.training import names
from optax_structured.training.lm import model
from optax_structured.trees import named_leaves


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_a_byte_is_predicted_from_those_before_it_alone(stacked):
    network = model.Functional(16, 2, 2, stacked)
    params, losses = jax.jit(network.init)(jax.random.key(0)), jax.jit(network.losses)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
    targets = jnp.zeros_like(tokens)
    before = losses(params, tokens, targets)
    after = losses(params, tokens.at[:, 7:].set(3), targets)
    np.testing.assert_allclose(after[:, :7], before[:, :7], rtol=reordered(before.dtype))
    assert np.all(np.abs(after - before)[:, 7:] > 0)


@pytest.mark.parametrize("stacked", [False, True])
def test_exactly_the_matrices_of_attention_and_mlp_are_for_low_rank(stacked):
    network = model.Functional(16, 3, 2, stacked)
    params = jax.eval_shape(network.init, jax.random.key(0))
    chosen = {path: leaf for path, leaf in named_leaves(params) if not re.search(names.PLAIN, path)}
    kinds = ("query", "key", "value", "out", "gate", "up", "down")
    assert len(chosen) == len(kinds) * (1 if stacked else 3)
    assert {path.split("/")[-2] for path in chosen} == set(kinds)
    assert {leaf.ndim for leaf in chosen.values()} == {3 if stacked else 2}
    assert len(named_leaves(params)) - len(chosen) == 3 + 2 * (1 if stacked else 3)


@pytest.mark.slow
def test_stacked_layers_are_the_same_function():
    plain, stacked = model.Functional(16, 2, 2), model.Functional(16, 2, 2, stacked=True)
    params = jax.jit(plain.init)(jax.random.key(0))
    blocks = [params.pop(f"block_{i}") for i in range(2)]
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 256)
    found = jax.jit(stacked.losses)(
        {**params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}, tokens, tokens
    )
    split = {f"block_{i}": block for i, block in enumerate(blocks)}
    expected = jax.jit(plain.losses)({**params, **split}, tokens, tokens)
    np.testing.assert_allclose(found, expected, rtol=reordered(found.dtype))


@pytest.mark.slow
def test_rotary_products_depend_on_the_distance_alone():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8))
    y = jax.random.normal(jax.random.key(1), (1, 1, 1, 8))
    rotated = [model.rotate(jnp.tile(z, (1, 6, 1, 1)))[0, :, 0] for z in (x, y)]
    products = rotated[0] @ rotated[1].T
    for offset in range(-3, 4):
        diagonal = jnp.diagonal(products, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=reordered(x.dtype))
    np.testing.assert_array_equal(rotated[0][0], x.ravel())


@pytest.mark.slow
def test_the_first_loss_is_that_of_a_uniform_guess():
    network = model.Functional(32, 1, 2)
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, 256)
    params = jax.jit(network.init)(jax.random.key(0))
    losses = jax.jit(network.losses)(params, tokens, tokens)
    assert float(losses.mean()) == pytest.approx(np.log(256), abs=0.05)
    assert model.mlp_width(512) == 1368 and model.mlp_width(128) == 344
