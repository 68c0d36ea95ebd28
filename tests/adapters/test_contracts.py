"""What every adapter, and every transformation over them, keeps: a new one joins by a line."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structured as oxs
from optax_structured.adapters import (
    GGPO,
    MGPO,
    SNELL,
    SNELLA,
    Codebook,
    Full,
    LoRA,
    MinimumNorm,
    SparsityAllocator,
    SVFit,
    constants,
    init,
    lora_pro,
    lora_pro_full,
    merge,
    perturbed_value_and_grad,
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


def same(got, want, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_a_transformation_goes_on_bit_for_bit(name):
    tx, start = CASES[name](0.01), adapter()

    def step(carry):
        adapter, state = carry
        grads = jax.tree.map(lambda x: jnp.sin(1 + 7 * x), adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    goes_on(step, (start, tx.init(start)), jax.eval_shape(lambda x: (x, tx.init(x)), start))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_transformation_inside_others(name):
    """All of them in one program, against the transformation alone and without jit."""
    make, grads, start = CASES[name], gradient(0), adapter()
    tx, many = make(0.01), {path: path != "head" for path in start}
    of_head = {path: "all" if kept else "head" for path, kept in many.items()}
    collected, guarded = optax.MultiSteps(tx, 2), oxs.skip_nonfinite(tx)
    around = {
        "inject_hyperparams": optax.inject_hyperparams(make)(optax.constant_schedule(0.01)),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "skip_nonfinite": guarded,
        "masked": optax.masked(tx, many),
        "masked by a function": optax.masked(tx, lambda tree: {path: many[path] for path in tree}),
        "partition": optax.partition({"all": tx, "head": optax.identity()}, of_head),
    }
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)

    @jax.jit
    def run(grads, start):
        found = {n: w.update(grads, w.init(start), start)[0] for n, w in around.items()}
        waiting, state = collected.update(grads, collected.init(start), start)
        emitted, _ = collected.update(grads, state, start)
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (grads, start))
        seeds = jax.vmap(lambda g, x: tx.update(g, tx.init(x), x)[0])(*stacked)
        return found, waiting, emitted, seeds, guarded.update(bad, guarded.init(start), start)

    want, _ = tx.update(grads, tx.init(start), start)
    found, waiting, emitted, seeds, (nothing, after) = run(grads, start)
    for wrapper, got in found.items():
        in_part = wrapper.startswith(("masked", "partition"))
        same(got, {**want, "head": grads["head"]} if in_part else want)
    same(emitted, want)
    same(jax.tree.map(lambda x: x[1], seeds), want, 1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves((waiting, nothing)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))


@pytest.mark.parametrize("name", sorted(set(CASES) - {"scale_b"}))
def test_params_are_asked_for(name):
    tx = CASES[name](0.01)
    with pytest.raises(ValueError, match="needs? .*param"):
        tx.update(gradient(0), tx.init(adapter()))


@pytest.mark.parametrize("name", sorted(set(CASES) - {"lora_pro", "lora_pro_published"}))
def test_states_say_which_arrays_are_of_parameters(name):
    """Those without state of their own have nothing to say."""
    tx, start = CASES[name](0.01), adapter()
    state = jax.eval_shape(tx.init, start)
    left = optax.tree_map_params(tx, lambda _: None, state)
    assert len(jax.tree.leaves(left)) < len(jax.tree.leaves(state))
    assert all(x.ndim == 0 for x in jax.tree.leaves(left))  # counters


@pytest.mark.parametrize("name", sorted(set(CASES) - {"stack_pairs"}))
def test_nothing_and_none(name):
    """Not `stack_pairs`: its recipe refuses a pattern that matches nothing."""
    tx = CASES[name](0.01)
    for tree in ({}, {"gone": None}):
        updates, _ = tx.update(tree, tx.init(tree), tree)
        assert updates == tree


# Adapters

METHODS = {
    "lora": LoRA(2),
    "lora_root": LoRA(2, scaling="root"),
    "lora_svd": LoRA(2, start="svd"),
    "svfit": SVFit(2),
    "svfit_relative": SVFit(2, relative=True),
    "snell": SNELL(2, sparsity=0.3),
    "snell_dense": SNELL(2, sparsity=None),
    "snella": SNELLA(2),
    "codebook": Codebook(entries=3, groups=2),
    "full": Full(),
}


def weights(dtype=jnp.float32):
    w = jnp.sin(jnp.arange(24.0)).reshape(6, 4)
    return {"w": w.astype(dtype), "gone": None, "head": jnp.ones((4, 2), dtype), "ids": jnp.ones(2)}


def table(spec):
    return oxs.rules(("^w$", spec), ("head", Full()), default=None)


def plain(tree):
    """Leaves as a checkpoint keeps them: arrays of NumPy."""

    def one(x):
        typed = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if typed else x)

    return [one(x) for x in jax.tree.leaves(tree)]


def restored(saved, like):
    """From leaves alone, into a tree that nobody has computed."""
    leaves, structure = jax.tree.flatten(like)

    def one(x, y):
        typed = jnp.issubdtype(y.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(jnp.asarray(x)) if typed else jnp.asarray(x, y.dtype)

    return structure.unflatten([one(x, y) for x, y in zip(saved, leaves, strict=True)])


def goes_on(step, start, like):
    """Five donated steps of a program that a scan could carry, the last two from a checkpoint."""
    traces = []
    assert types(like) == (kept := types(start))  # the first carry has an abstract form

    @functools.partial(jax.jit, donate_argnums=0)
    def jitted(carry):
        traces.append(1)
        return step(carry)

    carry = start
    for i in range(5):
        if i == 3:
            saved = plain(carry)
        carry = jitted(carry)
    assert types(carry) == kept
    again = restored(saved, like)
    for _ in range(2):
        again = jitted(again)
    assert jax.tree.structure(again) == jax.tree.structure(carry)
    jax.tree.map(np.testing.assert_array_equal, plain(again), plain(carry))
    assert len(traces) == 1
    return carry


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_merging_keeps_the_types(name, dtype):
    params = weights(dtype)
    adapter = init(jax.random.key(0), params, table(METHODS[name]))
    assert {x.dtype.name for x in jax.tree.leaves(adapter)} == {"float32"}
    known = constants(params, adapter)
    warned = contextlib.nullcontext()
    if dtype == jnp.bfloat16:
        warned = pytest.warns(UserWarning, match="adapters.merge rounds the sum to bfloat16")
    with warned:
        merged = jax.eval_shape(functools.partial(merge, constants=known), params, adapter)
    assert types(merged) == types(jax.eval_shape(lambda: params))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_goes_on_bit_for_bit(name):
    """One of its leaves frozen by its label, the other trained."""
    params = weights()
    start = init(jax.random.key(0), params, table(METHODS[name]))
    known = constants(params, start)
    tx = optax.partition(
        {"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, {"w": "train", "head": "freeze"}
    )

    def step(carry):
        adapter, state = carry

        def loss(adapter):
            return jnp.sum(jnp.sin(3 * merge(params, adapter, known)["w"]))

        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    def first(adapter):
        return adapter, tx.init(adapter)

    before = jax.tree.map(np.array, start)
    ended, _ = goes_on(step, first(start), jax.eval_shape(first, start))
    start = jax.tree.map(jnp.asarray, before)
    np.testing.assert_array_equal(ended["head"].x, start["head"].x)
    before, after = (merge(params, x, known)["w"] for x in (start, ended))
    assert np.all(np.isfinite(after)) and not np.array_equal(before, after)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_under_vmap(name):
    """Over seeds, as shapes: what `init` reads off the weights is the same for all."""
    params = weights()
    known = constants(params, init(jax.random.key(0), params, table(METHODS[name])))

    def merged(key):
        return merge(params, init(key, params, table(METHODS[name])), known)

    many = jax.eval_shape(jax.vmap(merged), jax.random.split(jax.random.key(0), 3))
    assert jax.tree.map(lambda x: x.shape, many) == jax.tree.map(lambda x: (3, *x.shape), params)


def test_merging_nothing():
    params = weights()
    assert types(merge(params, {})) == types(params)
    assert merge({}, {}) == {} and constants({}, {}) == {}
    with pytest.raises(ValueError, match="the rules adapt no weight of these parameters"):
        init(jax.random.key(0), {}, LoRA(2))


# Perturbations

RELEASED = {"sign": -1, "space": "weights", "norm": "per_leaf", "max_multiplier": 10.0}
PERTURBATIONS = {
    "mgpo": MGPO(0.3),
    "mgpo_released": MGPO(0.3, **RELEASED),
    "ggpo": GGPO(0.3, 0.1),
    "ggpo_quadrature": GGPO(0.3, 0.1, combine="quadrature", cap=0.5),
}


def perturbed(name, params, head="train"):
    """A step, and its first carry from an adapter with a node that is no pair."""
    perturbation = PERTURBATIONS[name]

    def loss(params, adapter):
        return jnp.sum(jnp.sin(sum(map(jnp.sum, jax.tree.leaves(merge(params, adapter))))))

    tx = optax.partition(
        {"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, {"w": "train", "head": head}
    )

    def step(carry):
        adapter, moments, state = carry
        _, gradient, state = perturbed_value_and_grad(loss, perturbation)(state, params, adapter)
        updates, moments = tx.update(gradient, moments, adapter)
        return optax.apply_updates(adapter, updates), moments, state

    def first(adapter):
        return adapter, tx.init(adapter), perturbation.init(params, adapter)

    start = init(jax.random.key(0), params, table(LoRA(2)))
    return step, first, start


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_goes_on_bit_for_bit(name):
    params = weights()
    step, first, start = perturbed(name, params, head="freeze")
    head = np.array(start["head"].x)
    ended, *_ = goes_on(step, first(start), jax.eval_shape(first, start))
    np.testing.assert_array_equal(ended["head"].x, head)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(ended))


def test_an_allocator_goes_on_bit_for_bit():
    kernels = init(jax.random.key(0), weights(), table(SNELLA(2)))
    allocator = SparsityAllocator(total=5, target=0.8)

    def step(carry):
        state, t = carry
        grads = jax.tree.map(lambda x: jnp.sin(x + t), kernels)
        return allocator.allocate(allocator.observe(state, kernels, grads), t), t + 1

    def first(adapter):
        return allocator.init(adapter), jnp.zeros((), jnp.int32)

    (ended, _) = goes_on(step, first(kernels), jax.eval_shape(first, kernels))
    assert ended.sparsity["w"] > 0.5


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_under_vmap_and_in_half_precision(name):
    step, first, start = perturbed(name, weights(jnp.bfloat16))
    many = jax.eval_shape(lambda x: jax.tree.map(lambda x: jnp.stack([x, x]), x), start)
    with pytest.warns(UserWarning, match="rounds the sum to bfloat16"):
        carry = jax.eval_shape(first, start)
        assert types(jax.eval_shape(step, carry)) == types(carry)
        carries = jax.eval_shape(jax.vmap(first), many)
        assert types(jax.eval_shape(jax.vmap(step), carries)) == types(carries)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_of_nothing(name):
    with pytest.raises(ValueError, match="perturbs pairs of LoRA, and this adapter has none"):
        PERTURBATIONS[name].init({}, {})
