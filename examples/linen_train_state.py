"""flax.linen with a TrainState: a network whose useless inputs end at exactly zero."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

import optax_structured as oxs

STEPS = 600
x = jax.random.normal(jax.random.key(0), (1024, 20))
y = jnp.abs(x[:, :3]) @ jnp.ones((3, 4))  # 17 of the 20 inputs are useless

model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
params = model.init(jax.random.key(1), x)["params"]
structure = oxs.presets.groups(model, oxs.GroupLasso, x)  # one group per input of each layer
optimizer = oxs.ramda(0.03, structure, strength=0.03, stages=oxs.Stages.equal(STEPS))
state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


@jax.jit
def step(state):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


for _ in range(STEPS):
    state, value = step(state)
alive = jnp.any(state.params["layers_0"]["kernel"] != 0, axis=1)
print(f"loss {value:.3f}; inputs that are left: {jnp.flatnonzero(alive)}")
