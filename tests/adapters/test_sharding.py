"""Eight devices: adapters live with the axes they meet, and no base weight is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import all_collectives, shapes_of
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import reordered

import optax_structured as oxs
from optax_structured.adapters import (
    SNELLA,
    Codebook,
    Full,
    LoRA,
    SVFit,
    constants,
    init,
    lora_pro,
    merge,
)

SPECS = {"kernel": P("data", "model"), "stack": P(None, "model", "data")}
SHAPES = {"kernel": (64, 32), "stack": (2, 32, 64)}


def mesh(kind):
    devices = np.asarray(jax.devices("cpu")[:8]).reshape(4, 2)
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {n: jax.random.normal(k, s) for (n, s), k in zip(SHAPES.items(), keys, strict=True)}


def on(kind):
    return {
        name: jax.device_put(x, NamedSharding(mesh(kind), SPECS[name]))
        for name, x in params().items()
    }


def moved(adapter):
    return jax.tree.map(lambda x: x + 0.1, adapter)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "spec", [LoRA(4), LoRA(4, start="svd"), SVFit(4)], ids=["lora", "svd", "svfit"]
)
def test_merging_keeps_the_sharding(spec, kind):
    start = init(jax.random.key(1), params(), spec)
    want = merge(params(), moved(start))
    with jax.set_mesh(mesh(kind)):
        placed = on(kind)
        adapter = init(jax.random.key(1), placed, spec)
        if isinstance(spec, LoRA):
            assert adapter["kernel"].a.sharding.spec[-1] == "data"
            assert adapter["kernel"].b.sharding.spec[-2] == "model"
            assert adapter["stack"].a.sharding.spec[-1] == "model"
        known = constants(placed, adapter)
        got = jax.jit(merge)(placed, moved(adapter), known)
        eager = merge(placed, moved(adapter), known)
    for name, leaf in got.items():
        for x in (leaf, eager[name]):
            assert x.sharding.is_equivalent_to(placed[name].sharding, x.ndim), name
        np.testing.assert_allclose(leaf, want[name], rtol=0, atol=10 * reordered(jnp.float32))


OTHERS = oxs.rules(("sparse", SNELLA(4)), ("codes", Codebook(4, groups=2)), default=Full())


@pytest.mark.slow
def test_other_methods_on_an_explicit_mesh():
    """SNELLA, codebooks and whole weights merge there as they do on one device."""
    w = params()["kernel"]
    weights = dict.fromkeys(("sparse", "codes", "full"), w)
    want = merge(weights, moved(init(jax.random.key(1), weights, OTHERS)))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        home = NamedSharding(mesh(AxisType.Explicit), SPECS["kernel"])
        placed = {name: jax.device_put(w, home) for name in weights}
        adapter = moved(init(jax.random.key(1), placed, OTHERS))
        got = jax.jit(merge)(placed, adapter, constants(placed, adapter))
    for name, leaf in got.items():
        assert leaf.sharding.is_equivalent_to(home, 2), name
        np.testing.assert_allclose(leaf, want[name], rtol=0, atol=10 * reordered(jnp.float32))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_compiled_step_gathers_no_base_weight(kind):
    with jax.set_mesh(mesh(kind)):
        placed = on(kind)
        adapter = init(jax.random.key(1), placed, LoRA(4))
        tx = optax.adam(1e-2)

        @jax.jit
        def step(placed, adapter, state):
            def loss(adapter):
                return sum(jnp.sum(jnp.sin(x)) for x in merge(placed, adapter).values())

            updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
            return optax.apply_updates(adapter, updates), state

        text = step.lower(placed, adapter, tx.init(adapter)).compile().as_text()
    smallest = min(x.size for x in params().values()) // 8
    for line in all_collectives(text):
        assert all(np.prod(shape, initial=1) <= smallest for shape in shapes_of(line)), line


@pytest.mark.slow
def test_lora_pro_on_an_explicit_mesh():
    gradient = jax.tree.map(jnp.sin, moved(init(jax.random.key(2), params(), LoRA(4))))
    plain = moved(init(jax.random.key(1), params(), LoRA(4)))
    want, _ = lora_pro().update(gradient, optax.EmptyState(), plain)
    kind = AxisType.Explicit
    with jax.set_mesh(mesh(kind)):
        placed = on(kind)
        adapter = moved(init(jax.random.key(1), placed, LoRA(4)))
        like = jax.tree.map(
            lambda g, x: jax.device_put(np.asarray(g), x.sharding), gradient, adapter
        )
        got, _ = jax.jit(lora_pro().update)(like, optax.EmptyState(), adapter)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3 * np.abs(y).max())
