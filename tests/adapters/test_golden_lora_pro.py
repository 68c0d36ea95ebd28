"""The published steps of LoRA-Pro, replayed from what the files say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from references.exact_adam import scale_by_exact_adam
from tolerances import GOLDEN

from optax_structured.adapters import MinimumNorm, Pair, decayed, lora_pro, lora_pro_full
from optax_structured.trees import Axes

TORCH = Axes(rows=-1, cols=-2)  # a weight is (outputs, inputs)


def narrow(g, t):
    """The gradient rounded to bfloat16 from the second step on."""
    return jnp.where(t == 1, g, g.astype(jnp.bfloat16).astype(g.dtype))


def optimizer(meta):
    solver = MinimumNorm(float(np.float32(meta["delta"])), meta["x_mode"])
    if meta["variant"].startswith("sgd"):
        return optax.chain(lora_pro(solver), optax.sgd(meta["lr"]))
    adam = {key: meta[key] for key in ("b1", "b2", "eps")}
    if "full-space" not in meta["variant"]:
        step = scale_by_exact_adam(**adam)
        return optax.chain(lora_pro(solver), step, optax.scale(-meta["lr"]))
    as_released = re.match("none: .* rounded to bfloat16", meta["deviation"])
    inner = scale_by_exact_adam(**adam, **({"rounded": narrow} if as_released else {}))
    return optax.chain(lora_pro_full(inner, solver), optax.scale(-meta["lr"]))


def pairs(golden, key):
    """The pairs of a file, with a step axis where it has one."""
    factors = {x: golden.leaves(key) for x in "ab"}
    scale = golden.meta["scale"]
    return {
        leaf: Pair(factors["a"][f"{leaf}/a"], factors["b"][f"{leaf}/b"], scale, TORCH)
        for leaf in golden.meta["leaves"]
    }


def replay(golden):
    meta, tx = golden.meta, optimizer(golden.meta)
    amount = meta["lr"] * meta.get("weight_decay", 0.0)
    base = {leaf: np.zeros_like(g[0]) for leaf, g in golden.leaves("full_grads").items()}

    def step(carry, grads):
        adapter, state = carry
        updates, state = tx.update(grads, state, adapter)
        if amount and "full-space" in meta["variant"]:
            _, adapter = decayed(base, adapter, amount)
        elif amount:
            adapter = jax.tree.map(lambda x: (1 - amount) * x, adapter)
        adapter = optax.apply_updates(adapter, updates)
        return (adapter, state), adapter

    start = jax.tree.map(jnp.asarray, pairs(golden, "params0"))
    grads = jax.tree.map(jnp.asarray, pairs(golden, "grads"))
    (_, state), run = jax.lax.scan(step, (start, tx.init(start)), grads)
    for leaf, want in pairs(golden, "params").items():
        for x in "ab":
            assert_near(getattr(run[leaf], x), getattr(want, x), f"{leaf}/{x}")
        gradient = golden.leaves("full_grads")[leaf][1:]
        seen = golden.meta["scale"] * np.swapaxes(want.b[:-1], -1, -2) @ gradient
        assert_near(seen, pairs(golden, "grads")[leaf].a[1:], f"gradient of {leaf}/a")
    for name, moment in (("m", "mu"), ("v", "nu")):
        for leaf, want in golden.leaves(f"state/{name}").items():
            got = optax.tree.get(state, moment)[leaf]
            assert_near(np.swapaxes(got, -1, -2), want[-1], f"{name} of {leaf}")


def assert_near(got, want, name):
    np.testing.assert_allclose(got, want, rtol=0, atol=GOLDEN * np.abs(want).max(), err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("lora_pro-"))
def test_published_run(name):
    replay(load(name))
