"""Haiku: a network whose useless inputs end at exactly zero."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import optax_structured as oxs

STEPS = 600
x = jax.random.normal(jax.random.key(0), (1024, 20))
y = jnp.abs(x[:, :3]) @ jnp.ones((3, 4))  # 17 of the 20 inputs are useless

model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4])(x)))
params = model.init(jax.random.key(1), x)
structure = oxs.presets.groups(model, oxs.GroupLasso, x)  # one group per input of each layer
optimizer = oxs.ramda(0.03, structure, strength=0.03, stages=oxs.Stages.equal(STEPS))
state = optimizer.init(params)


@jax.jit
def step(params, state):
    value, gradients = jax.value_and_grad(lambda p: jnp.mean((model.apply(p, x) - y) ** 2))(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


for _ in range(STEPS):
    params, state, value = step(params, state)
alive = jnp.any(params["mlp/~/linear_0"]["w"] != 0, axis=1)
print(f"loss {value:.3f}; inputs that are left: {jnp.flatnonzero(alive)}")
