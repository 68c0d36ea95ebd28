"""Whole models of several libraries with dead units: equal, and smaller where they can be."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from compact_models import IMAGES, TOKENS, Separable, dead
from flax import nnx
from tolerances import REORDERED, assert_close

from optax_structured.compact import compact
from optax_structured.training.images.models import ConvNet
from optax_structured.training.lm.model import Functional

pytestmark = pytest.mark.slow
CLOSE = 5 * REORDERED["float32"]


def check(fn, params, *inputs, unroll=False):
    small = compact(fn, params, *inputs, unroll=unroll)
    found, expected = jax.jit(small.fn)(small.params, *inputs), jax.jit(fn)(params, *inputs)
    assert_close(found, expected, CLOSE)
    assert small.report.params[1] < small.report.params[0]
    # XLA counts the body of a scan once.
    assert unroll or small.report.flops[1] < small.report.flops[0]
    return small


def test_the_convolutional_network_of_the_command():
    model = ConvNet((3, 4), window=3, padding=1, hidden=5, classes=2)
    params = model.init(jax.random.key(0), IMAGES)
    params = dead(params, ("Conv_1/kernel", 2, [0]), ("Dense_1/kernel", 0, [1, 2]))
    small = check(model.apply, params, IMAGES).params["params"]
    assert small["Conv_0"]["kernel"].shape == (3, 3, 1, 2)
    assert small["Dense_0"]["kernel"].shape == (16, 3)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        def norm(x):
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
        y = nn.relu(norm(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(x + norm(nn.Conv(4, (3, 3))(y)))
        return nn.Dense(3)(x.mean((1, 2)))


def test_residual_network_with_batch_norm():
    params = Residual().init(jax.random.key(0), IMAGES)
    params = dead(params, ("Conv_2/kernel", 2, [1, 4]))
    small = check(Residual().apply, params, IMAGES)
    assert small.params["params"]["Conv_1"]["kernel"].shape == (3, 3, 4, 4)
    assert small.params["batch_stats"]["BatchNorm_1"]["var"].shape == (4,)


def test_depthwise_separable():
    params = Separable().init(jax.random.key(0), IMAGES)
    params = dead(params, ("Conv_2/kernel", 2, [0, 5]))
    small = check(Separable().apply, params, IMAGES).params["params"]
    assert small["Conv_1"]["kernel"].shape == (3, 3, 1, 4)
    assert small["Conv_0"]["kernel"].shape == (1, 1, 1, 4)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
def test_the_transformer_of_the_command(stacked):
    model = Functional(8, 2, 2, stacked)
    params = model.init(jax.random.key(0))
    row = 1 if stacked else 0
    units = [("mlp/down/kernel", row, [0, 3, 7]), ("attention/out/kernel", row, range(4))]
    params = dead(params, *units)
    small = check(model.losses, params, TOKENS, TOKENS, unroll=stacked)
    block = small.params["blocks" if stacked else "block_0"]
    assert block["mlp"]["up"]["kernel"].shape[-1] == 24 - 3
    assert block["attention"]["query"]["kernel"].shape[-1] == 4


def test_tied_embedding():
    def fn(params, tokens):
        x = params["embed"][tokens]
        x = x + jax.nn.gelu(x @ params["up"]) @ params["down"]
        return x @ params["embed"].T

    params = {"embed": jnp.ones((7, 4)), "up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
    params = dead(params, ("down", 0, [1]), ("down", 1, [2]), ("embed", 1, [2]))
    small = check(fn, params, TOKENS % 7).params
    shapes = {name: leaf.shape for name, leaf in small.items()}
    assert shapes == {"embed": (7, 3), "up": (3, 5), "down": (5, 3)}


def test_equinox():
    model = eqx.nn.MLP(3, 2, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    params = dead(params, ("layers/1/weight", 1, [0, 2]))
    x = IMAGES.reshape(-1, 4)[:, :3]
    small = check(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x)
    assert small.params.layers[0].weight.shape == (4, 3)


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.tanh(self.a(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    params = dead(nnx.to_pure_dict(state), ("b/kernel", 0, [1]))
    small = check(lambda p, x: nnx.merge(graph, p)(x), params, IMAGES.reshape(-1, 4)[:, :3])
    assert small.params["a"]["kernel"].shape == (3, 5)
