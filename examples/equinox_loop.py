"""Equinox: a network whose useless inputs end at exactly zero."""

import equinox as eqx
import jax
import jax.numpy as jnp

import optax_structured as oxs

STEPS = 600
x = jax.random.normal(jax.random.key(0), (1024, 20))
y = jnp.abs(x[:, :3]) @ jnp.ones((3, 4))  # 17 of the 20 inputs are useless

model = eqx.nn.MLP(20, 4, width_size=16, depth=1, key=jax.random.key(1))
structure = oxs.presets.groups(model, oxs.GroupLasso)  # equinox kernels are (out, in): it knows
optimizer = oxs.ramda(0.03, structure, strength=0.03, stages=oxs.Stages.equal(STEPS))
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def step(model, state):
    def loss(model):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    value, gradients = eqx.filter_value_and_grad(loss)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(gradients, state, params)
    return eqx.apply_updates(model, updates), state, value


for _ in range(STEPS):
    model, state, value = step(model, state)
alive = jnp.any(model.layers[0].weight != 0, axis=0)
print(f"loss {value:.3f}; inputs that are left: {jnp.flatnonzero(alive)}")
