"""Training loops of flax (nnx and linen) and equinox: the loss falls, and all agree."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from recipes_table import assert_close, every_case, jitted, normal, run
from tolerances import reordered

STEPS = 3
X = normal("x", (16, 5))
Y = normal("y", (16, 3))
KERNELS = [normal("k0", (5, 4)) / 2, normal("k1", (4, 3)) / 2]
BIASES = [normal("b0", (4,)) / 2, normal("b1", (3,)) / 2]


@functools.cache
def reference(case):
    """The same network by hand."""
    tx = case.build()
    start = {"kernels": KERNELS, "biases": BIASES}

    def loss(p):
        hidden = jnp.tanh(X @ p["kernels"][0] + p["biases"][0])
        return jnp.mean((hidden @ p["kernels"][1] + p["biases"][1] - Y) ** 2)

    current, state = start, tx.init(start)
    for _ in range(STEPS):
        current, state = jitted(tx)(jax.grad(loss)(current), state, current)
    return current


def assert_same(kernels, biases, expected):
    assert_close(list(kernels), expected["kernels"], 50 * reordered(jnp.float32))
    assert_close(list(biases), expected["biases"], 50 * reordered(jnp.float32))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@every_case
def test_nnx(case):
    model = NnxNet(nnx.Rngs(0))
    for layer, kernel, bias in zip((model.first, model.second), KERNELS, BIASES, strict=True):
        layer.kernel[...] = kernel
        layer.bias[...] = bias
    optimizer = nnx.Optimizer(model, case.build(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(STEPS):
        step(model, optimizer)
    layers = (model.first, model.second)
    assert_same(
        [layer.kernel[...] for layer in layers],
        [layer.bias[...] for layer in layers],
        reference(case),
    )


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(4)(x)
        return nn.Dense(3)(jnp.tanh(hidden))


@every_case
def test_linen(case):
    names = ("Dense_0", "Dense_1")
    start = {
        name: {"kernel": kernel, "bias": bias}
        for name, kernel, bias in zip(names, KERNELS, BIASES, strict=True)
    }
    net = LinenNet()
    expected_types = jax.eval_shape(net.init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, expected_types)
    tx = case.build()

    @jax.jit
    def step(current, state):
        grads = jax.grad(lambda p: jnp.mean((net.apply({"params": p}, X) - Y) ** 2))(current)
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    current, state = start, tx.init(start)
    for _ in range(STEPS):
        current, state = step(current, state)
    assert_same(
        [current[name]["kernel"] for name in names],
        [current[name]["bias"] for name in names],
        reference(case),
    )


class EquinoxNet(eqx.Module):
    kernels: list
    biases: list
    activation: object = jnp.tanh  # not an array: eqx.filter makes it None

    def __call__(self, x):
        hidden = self.activation(x @ self.kernels[0] + self.biases[0])
        return hidden @ self.kernels[1] + self.biases[1]


@every_case
def test_equinox(case):
    model = EquinoxNet(list(KERNELS), list(BIASES))
    tx = case.build()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    assert_same(model.kernels, model.biases, reference(case))


@every_case
def test_loss_falls(case):
    """Closed loop, many steps: a sanity check that every line of the table is an optimizer."""
    target = normal("target", (6, 4))
    loss = lambda w: 0.5 * jnp.sum((w - target) ** 2)  # noqa: E731
    tx = case.build(learning_rate=0.1)

    @jax.jit
    def train(w):
        def body(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), loss(w)

        return jax.lax.scan(body, (w, tx.init(w)), length=200)[1]

    losses = np.asarray(train(jnp.zeros((6, 4))))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


def test_run_is_the_loop_it_claims_to_be():
    tx = optax.sgd(1.0)
    assert_close(run(tx, jnp.ones(2), [jnp.ones(2)] * 3)[0], jnp.full(2, -2.0), 0.0)
