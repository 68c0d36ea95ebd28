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


def optimizer(golden, said):
    meta = golden.meta
    solver = MinimumNorm(float(np.float32(said["delta"])), meta["x_mode"])
    if meta["variant"].startswith("sgd"):
        return optax.chain(lora_pro(solver), optax.sgd(said["lr"]))
    adam = {key: said[key] for key in ("b1", "b2", "eps")}
    if "full-space" not in meta["variant"]:
        step = scale_by_exact_adam(**adam)
        return optax.chain(lora_pro(solver), step, optax.scale(-said["lr"]))
    as_released = re.match("none: .* rounded to bfloat16", meta["deviation"])
    inner = scale_by_exact_adam(**adam, **({"rounded": narrow} if as_released else {}))
    return optax.chain(lora_pro_full(inner, solver), optax.scale(-said["lr"]))


def pairs(golden, key, scale):
    """The pairs of a file, with a step axis where it has one."""
    stored = golden.leaves(key)

    def factor(leaf, name, axes):
        return golden.as_matrix(stored[f"{leaf}/{name}"], name, axes)

    return {
        leaf: Pair(factor(leaf, "a", "rn"), factor(leaf, "b", "mr"), scale, TORCH)
        for leaf in golden.meta["leaves"]
    }


def replay(golden):
    meta, said = golden.meta, golden.settings()
    tx, scale = optimizer(golden, said), said["scale"]
    amount = said["lr"] * said.get("weight_decay", 0.0)
    said.check_all_read()
    full = {
        leaf: golden.as_matrix(g, "full_grads", "mn")
        for leaf, g in golden.leaves("full_grads").items()
    }
    base = {leaf: np.zeros_like(g[0]) for leaf, g in full.items()}

    def step(carry, grads):
        adapter, state = carry
        updates, state = tx.update(grads, state, adapter)
        if amount and "full-space" in meta["variant"]:
            _, adapter = decayed(base, adapter, amount)
        elif amount:
            adapter = jax.tree.map(lambda x: (1 - amount) * x, adapter)
        adapter = optax.apply_updates(adapter, updates)
        return (adapter, state), adapter

    start = jax.tree.map(jnp.asarray, pairs(golden, "params0", scale))
    grads = jax.tree.map(jnp.asarray, pairs(golden, "grads", scale))
    (_, state), run = jax.lax.scan(step, (start, tx.init(start)), grads)
    for leaf, want in pairs(golden, "params", scale).items():
        for x in "ab":
            assert_near(getattr(run[leaf], x), getattr(want, x), f"{leaf}/{x}")
        seen = scale * np.swapaxes(want.b[:-1], -1, -2) @ full[leaf][1:]
        assert_near(seen, grads[leaf].a[1:], f"gradient of {leaf}/a")
    for name, moment in (("m", "mu"), ("v", "nu")):
        for leaf, stored in golden.leaves(f"state/{name}").items():
            got = getattr(adam_of(state), moment)[leaf]
            want = golden.as_matrix(stored[-1], "full_grads", "mn")
            assert_near(np.swapaxes(got, -1, -2), want, f"{name} of {leaf}")


def adam_of(state):
    """By its type: a leaf may have the name of one of its fields."""

    def is_adam(x):
        return isinstance(x, optax.ScaleByAdamState)

    (found,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    return found


def assert_near(got, want, name):
    np.testing.assert_allclose(got, want, rtol=0, atol=GOLDEN * np.abs(want).max(), err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("lora_pro-"))
def test_published_run(name):
    replay(load(name))
