"""flax.nnx with nnx.Optimizer: a network whose useless inputs end at exactly zero."""

import jax
import jax.numpy as jnp
from flax import nnx

import optax_structured as oxs

STEPS = 600
x = jax.random.normal(jax.random.key(0), (1024, 20))
y = jnp.abs(x[:, :3]) @ jnp.ones((3, 4))  # 17 of the 20 inputs are useless

model = nnx.Sequential(
    nnx.Linear(20, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1))
)
structure = oxs.presets.groups(model, oxs.GroupLasso)  # one group per input of each layer
recipe = oxs.ramda(0.03, structure, strength=0.03, stages=oxs.Stages.equal(STEPS))
optimizer = nnx.Optimizer(model, recipe, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    value, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, gradients)
    return value


for _ in range(STEPS):
    value = step(model, optimizer)
alive = jnp.any(model.layers[0].kernel[...] != 0, axis=1)
print(f"loss {value:.3f}; inputs that are left: {jnp.flatnonzero(alive)}")
