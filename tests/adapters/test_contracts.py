"""What every transformation over adapters keeps, in one table: a new one joins by adding a line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structured as oxs
from optax_structured.adapters import (
    SNELL,
    Full,
    LoRA,
    MinimumNorm,
    SVFit,
    init,
    lora_pro,
    lora_pro_full,
    rebalance_once,
    scale_b,
    stack_pairs,
)

SPECS = (("pair", LoRA(2)), ("values", SVFit(2)), ("sparse", SNELL(2)), ("head", Full()))
RANKS = oxs.rules(("pair", oxs.GroupLasso(group_axis=-1)), default=None)
CASES = {
    "scale_b": lambda rate: optax.chain(optax.adam(rate), scale_b(16.0)),
    "lora_pro": lambda rate: optax.chain(lora_pro(), optax.adam(rate)),
    "lora_pro_published": lambda rate: optax.chain(lora_pro(MinimumNorm()), optax.adam(rate)),
    "lora_pro_full": lambda rate: lora_pro_full(optax.adam(rate)),
    "stack_pairs": lambda rate: stack_pairs(oxs.prox_adam(rate, RANKS, strength=0.01)),
    "rebalance_once": lambda rate: rebalance_once(optax.adam(rate), 0.5, at=1),
}


def adapter():
    params = {name: jax.random.normal(jax.random.key(0), (6, 4)) for name, _ in SPECS}
    start = init(jax.random.key(1), params, oxs.rules(*SPECS, default=None))
    return jax.tree.map(lambda x: x + 0.1, start)


def gradient(seed):
    return jax.tree.map(lambda x: jnp.sin(seed + 7 * x), adapter())


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    make = CASES[name]
    tx, traces = make(0.01), []

    def step(adapter, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    jitted, start = jax.jit(step), adapter()
    state = tx.init(start)
    assert types(jax.eval_shape(tx.init, start)) == types(state)  # init is abstract
    now, found = start, state
    for seed in range(3):
        now, found = jitted(now, found, gradient(seed))
    assert len(traces) == 1  # nothing compiles again
    assert types((now, found)) == types((start, state))  # a scan can carry it
    eager, kept = start, state
    for seed in range(3):
        eager, kept = step(eager, kept, gradient(seed))
    for x, y in zip(jax.tree.leaves(now), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3)

    # A schedule from outside, and steps that are collected or skipped.
    injected = optax.inject_hyperparams(make)(optax.constant_schedule(0.01))
    moved, _ = jax.jit(injected.update)(gradient(0), injected.init(start), start)
    plain, _ = jax.jit(tx.update)(gradient(0), state, start)
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    collected = optax.MultiSteps(tx, 2)
    waiting, inner = jax.jit(collected.update)(gradient(0), collected.init(start), start)
    assert not any(np.any(x) for x in jax.tree.leaves(waiting))
    emitted, _ = jax.jit(collected.update)(gradient(0), inner, start)
    assert any(np.any(x) for x in jax.tree.leaves(emitted))
    guarded = oxs.skip_nonfinite(tx)
    bad = jax.tree.map(lambda g: g * jnp.nan, gradient(0))
    nothing, after = jax.jit(guarded.update)(bad, guarded.init(start), start)
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))

    # Many at once.
    many = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    states = jax.vmap(tx.init)(many)
    grads = jax.tree.map(lambda x: jnp.stack([x, x]), gradient(0))
    both, _ = jax.jit(jax.vmap(tx.update))(grads, states, many)
    for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"scale_b"}))
def test_params_are_asked_for(name):
    tx = CASES[name](0.01)
    with pytest.raises(ValueError, match="needs? .*param"):
        tx.update(gradient(0), tx.init(adapter()))
