"""Parameters of any library: nnx, haiku and lists; a checkpoint that goes on on another mesh."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_structured.adapters import LoRA, attach, init, merge

X = jax.random.normal(jax.random.key(5), (3, 6))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def in_nnx():
    graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    return (lambda state: nnx.merge(graph, state)(X)), state


def in_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP((8, 4))(x)))
    return (lambda params: net.apply(params, X)), net.init(jax.random.key(0), X)


def in_lists():
    layers = [jax.random.normal(jax.random.key(i), (6, 6)) for i in range(2)]
    return (lambda params: functools.reduce(lambda x, w: jnp.tanh(x @ w), params[0], X)), (layers,)


@pytest.mark.parametrize("build", [in_nnx, in_haiku, in_lists])
def test_a_step_of_any_parameters(build):
    apply, params = build()
    adapter = init(jax.random.key(1), params, LoRA(2))
    assert len(adapter) == 2
    before = jax.tree.map(np.array, params)
    assert jax.tree.structure(merge(params, adapter)) == jax.tree.structure(params)
    optimizer = optax.adam(0.1)

    def loss(adapter, way=merge):
        return jnp.mean(jnp.square(apply(way(params, adapter)) - 1))

    @jax.jit
    def step(adapter, state):
        updates, state = optimizer.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    moved, state = step(adapter, optimizer.init(adapter))
    moved, _ = step(moved, state)
    assert loss(moved) < loss(adapter)
    np.testing.assert_allclose(loss(moved, attach), loss(moved), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.slow
def test_an_adapter_alone_goes_on_on_another_mesh(tmp_path):
    weight = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
    optimizer = optax.adam(0.1)

    def placed(shape):
        devices = np.asarray(jax.devices("cpu")[:8]).reshape(shape)
        mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        base = jax.device_put(weight, NamedSharding(mesh, P("data", "model")))
        adapter = init(jax.random.key(1), base, LoRA(2))
        state = jax.device_put(optimizer.init(adapter), NamedSharding(mesh, P()))
        return base, adapter, state

    @jax.jit
    def step(base, adapter, state):
        # Entry by entry, so that no mesh adds up in another order.
        gradient = jax.tree.map(lambda x: jnp.sin(x) + 0.3, adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    base, adapter, state = placed((4, 2))
    for _ in range(2):
        adapter, state = step(base, adapter, state)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.StandardSave((adapter, state)))
        manager.wait_until_finished()
        there, *fresh = placed((2, 4))
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tuple(fresh)
        )
        again = manager.restore(2, args=ocp.args.StandardRestore(like))
    assert again[0]["w"].a.sharding.mesh.shape["data"] == 2
    jax.tree.map(np.testing.assert_array_equal, again, (adapter, state))
    for _ in range(2):
        adapter, state = step(base, adapter, state)
        again = step(there, *again)
    jax.tree.map(np.testing.assert_array_equal, again, (adapter, state))
