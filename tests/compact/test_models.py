"""Whole models of several libraries with dead units: equal, and smaller where they can be."""

import equinox as eqx
import flax.linen as nn
import jax
import pytest
from compact_models import IMAGES, TOKENS, Separable, dead
from flax import nnx
from tolerances import REORDERED, assert_close

from optax_structured.compact import compact
from optax_structured.training.images.models import ConvNet
from optax_structured.training.lm.model import Functional
from optax_structured.trees import named_leaves

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
    small = check(model.apply, params, IMAGES)
    assert small.params["params"]["Conv_0"]["kernel"].shape == (3, 3, 1, 2)
    assert small.report.features["params/Dense_0"] == (5, 3)


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


def test_heads_gated_mlps_rms_norms_and_a_tied_embedding():
    """A feature of the stream that nobody writes goes from the table that is read twice, too."""
    model = Functional(8, 2, 2)
    params = model.init(jax.random.key(0))
    del params["head"]

    def fn(params, tokens, targets):
        head = {"kernel": params["embed"]["embedding"].T}
        return model.losses({**params, "head": head}, tokens, targets)

    stream = ("embed/embedding", "attention/out/kernel", "mlp/down/kernel")
    units = ("block_0/attention/out/kernel", 0, range(4)), ("block_1/mlp/down/kernel", 0, [1])
    small = check(fn, dead(params, *units, *((name, 1, [2]) for name in stream)), TOKENS, TOKENS)
    shapes = {name: leaf.shape for name, leaf in named_leaves(small.params)}
    assert shapes["embed/embedding"] == (256, 7)
    assert shapes["block_0/attention/query/kernel"] == (7, 4)
    assert shapes["block_1/mlp/up/kernel"] == (7, 23)


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
    params = dead(state, ("b/kernel", 0, [1]))
    small = check(lambda p, x: nnx.merge(graph, p)(x), params, IMAGES.reshape(-1, 4)[:, :3])
    assert small.report.features == {"a": (6, 5), "b": (2, 2)}
