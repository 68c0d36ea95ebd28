"""Layers stacked by a scan, axes with logical names: a tree as MaxText holds it, under GaLore.

The stack is the second axis of each kernel, attention has an axis of heads, and a table says which
mesh axis each name is sharded over. Flax makes shardings of the names; the low-rank side, and where
the state lives, follow from the shardings. On CPU,
`XLA_FLAGS=--xla_force_host_platform_device_count=8` gives eight devices to try it on. With libtpu,
`python examples/maxtext_tree.py 7b` compiles a step of a 7B model for 256 chips instead.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import optax_structured as oxs
from optax_structured import planning

LOGICAL_RULES = (("embed", "fsdp"), ("vocab", None), ("mlp", None), ("heads", None))
NAMES = {
    "token_embedder": ("vocab", "embed"),
    "query": ("embed", "layers", "heads", "kv"),
    "out": ("heads", "layers", "kv", "embed"),
    "wi": ("embed", "layers", "mlp"),
    "wo": ("mlp", "layers", "embed"),
    "norm": ("embed", "layers"),
}


def placed(sizes, mesh):
    """Abstract parameters, sharded as the rules say."""
    names = {name: P(*axes) for name, axes in NAMES.items()}
    shardings = nn.logical_to_mesh_sharding(names, mesh, LOGICAL_RULES)
    return {
        name: jax.ShapeDtypeStruct(
            tuple(sizes[axis] for axis in axes), jnp.float32, sharding=shardings[name]
        )
        for name, axes in NAMES.items()
    }


def optimizer(params, rank):
    """The width is one side of each matrix, other names are the other, layers are a batch."""

    def spec(rows, cols):
        return oxs.LowRank(rank, period=50, axes=oxs.Axes(rows, cols))

    table = oxs.rules(
        ("embedder|norm", None),
        ("query", spec(0, (2, 3))),
        ("out", spec((0, 2), 3)),
        default=spec(0, 2),
    )
    return oxs.galore(1e-2, oxs.choose_sides(table, params))


def train():
    sizes = {"vocab": 64, "embed": 32, "layers": 3, "heads": 4, "kv": 8, "mlp": 64}
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    abstract = placed(sizes, mesh)
    tx = optimizer(abstract, rank=8)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    where = oxs.state_shardings(tx, abstract)
    keys = jax.random.split(jax.random.key(0), len(abstract))
    params = {
        name: jax.random.normal(key, leaf.shape) / sizes["embed"] ** 0.5
        for key, (name, leaf) in zip(keys, abstract.items(), strict=True)
    }
    params = jax.device_put(params | {"norm": jnp.ones_like(params["norm"])}, shardings)
    state = jax.jit(tx.init, out_shardings=where)(params)
    tokens = jax.random.randint(keys[0], (16,), 0, sizes["vocab"])

    def loss(params):
        def layer(x, p):
            normed = x * p["norm"]
            x = x + jnp.einsum("te,ehk,hkf->tf", normed, p["query"], p["out"]) / 4
            return x + jax.nn.relu(x @ p["wi"]) @ p["wo"] / 4, None

        layers = {k: jnp.moveaxis(v, 1, 0) for k, v in params.items() if k != "token_embedder"}
        x = jax.lax.scan(layer, params["token_embedder"][tokens], layers)[0]
        logits = x @ params["token_embedder"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[::-1]).mean()

    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, out_shardings=(shardings, where, None), donate_argnums=(0, 1))
    values = []
    for _ in range(60):
        params, state, value = step(params, state)
        values.append(float(value))  # emulated devices share threads: one step at a time
    print(f"loss {values[0]:.3f} -> {values[-1]:.3f}, {step._cache_size()} compilation")


def compile_7b():
    from optax_structured.planning import tpu

    sizes = {"vocab": 32000, "embed": 4096, "layers": 32, "heads": 32, "kv": 128, "mlp": 11008}
    params = placed(sizes, AbstractMesh((256,), ("fsdp",)))
    tx = optimizer(params, rank=1024)
    found = tpu.compile_step(tx, params, {"fsdp": 256}, planning.CHIPS["v5e"])
    print(
        f"compiled in {found.compile_seconds:.0f} s, temporaries {found.temporaries / 1e6:.0f} MB"
    )
    print(
        "a device receives at most", {k: f"{v / 1e6:.1f} MB" for k, v in found.traffic[1].items()}
    )


if __name__ == "__main__":
    compile_7b() if sys.argv[1:] == ["7b"] else train()
