"""Scan-stacked layers on a mesh, as MaxText holds them: GaLore, its state sharded as the weights.

On CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=8` gives eight devices to try it on.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_structured as oxs

LAYERS, WIDTH, HIDDEN = 4, 64, 256
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 3)
params = {
    "up": jax.random.normal(keys[0], (LAYERS, WIDTH, HIDDEN)) / WIDTH**0.5,
    "down": jax.random.normal(keys[1], (LAYERS, HIDDEN, WIDTH)) / HIDDEN**0.5,
    "scale": jnp.ones((LAYERS, WIDTH)),
}
specs = {"up": P(None, None, "fsdp"), "down": P(None, "fsdp", None), "scale": P()}
shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
params = jax.device_put(params, shardings)
x = jax.random.normal(keys[2], (32, WIDTH))

# The layer axis is a batch axis: one subspace per layer, in one leaf. The norm scales are stacked
# vectors, which look like a matrix: name them.
low_rank = oxs.rules(("scale", None), default=oxs.LowRank(rank=8, period=50))
optimizer = oxs.galore(1e-2, low_rank)
placed = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    params,
    shardings,
)
state_shardings = oxs.state_shardings(optimizer, placed)
state = jax.jit(optimizer.init, out_shardings=state_shardings)(params)


def loss(params):
    def layer(h, p):
        normed = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True)) * p["scale"]
        return h + jax.nn.gelu(normed @ p["up"]) @ p["down"], None

    return jnp.mean((jax.lax.scan(layer, x, params)[0] - jnp.roll(x, 1)) ** 2)


@jax.jit
def step(params, state):
    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


first = float(loss(params))
for _ in range(100):
    params, state, value = step(params, state)
    value.block_until_ready()  # emulated devices share threads: one step at a time
print(oxs.memory_report(optimizer, params, low_rank))
print(f"loss {first:.3f} -> {value:.3f}")
