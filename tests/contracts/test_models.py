"""Training loops of flax (nnx and linen) and equinox: all agree, and the loss falls."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from recipes_table import a_case_of_each_kind, assert_close, every_case, normal, run
from tolerances import reordered

STEPS = 3
X = normal("x", (16, 5))
Y = normal("y", (16, 3))
# The same paths in every library: seeds of random subspaces are functions of them.
START = {
    "first": {"kernel": normal("k0", (5, 4)) / 2, "bias": normal("b0", (4,)) / 2},
    "second": {"kernel": normal("k1", (4, 3)) / 2, "bias": normal("b1", (3,)) / 2},
}


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(4, name="first")(x)
        return nn.Dense(3, name="second")(jnp.tanh(hidden))


@functools.cache
def in_linen(case):
    net, tx = LinenNet(), case.build()
    expected_types = jax.eval_shape(net.init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, START) == jax.tree.map(jnp.shape, expected_types)

    @jax.jit
    def step(current, state):
        grads = jax.grad(lambda p: jnp.mean((net.apply({"params": p}, X) - Y) ** 2))(current)
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    current, state = START, tx.init(START)
    for _ in range(STEPS):
        current, state = step(current, state)
    return current


def assert_same(got, case):
    assert_close(got, in_linen(case), 50 * reordered(jnp.float32))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@every_case
def test_nnx_is_linen(case):
    model = NnxNet(nnx.Rngs(0))
    layers = {"first": model.first, "second": model.second}
    for name, layer in layers.items():
        layer.kernel[...] = START[name]["kernel"]
        layer.bias[...] = START[name]["bias"]
    optimizer = nnx.Optimizer(model, case.build(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(STEPS):
        step(model, optimizer)
    got = {
        name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for name, layer in layers.items()
    }
    assert_same(got, case)


class EquinoxNet(eqx.Module):
    first: dict
    second: dict
    activation: object = jnp.tanh  # not an array: eqx.filter makes it None

    def __call__(self, x):
        hidden = self.activation(x @ self.first["kernel"] + self.first["bias"])
        return hidden @ self.second["kernel"] + self.second["bias"]


@a_case_of_each_kind
def test_equinox_is_linen(case):
    model = EquinoxNet(**START)
    tx = case.build()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    assert_same({"first": model.first, "second": model.second}, case)


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
