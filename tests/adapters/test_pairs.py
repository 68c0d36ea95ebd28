"""Ranks that die exactly, factors that are rebalanced, and adapters as files and checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import optax_structured as oxs
from optax_structured.adapters import (
    SNELLA,
    Codebook,
    Full,
    LoRA,
    Pair,
    SVFit,
    constants,
    export,
    init,
    load,
    merge,
    rebalance_factors,
    rebalance_once,
    shrink,
    stack_pairs,
)

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def problem(rank=6):
    """A weight that an update of rank 1 makes right, and one step of full fine-tuning of it."""
    params = {"mlp": {"kernel": normal(8, 6)}, "head": normal(6, 2, seed=1)}
    table = oxs.rules(("head", Full()), default=LoRA(rank, alpha=float(rank)))
    target = params["mlp"]["kernel"] + jnp.outer(normal(8, seed=2), normal(6, seed=3))

    def loss(adapter):
        merged = merge(params, adapter)
        return jnp.sum((merged["mlp"]["kernel"] - target) ** 2) + jnp.sum((merged["head"] - 1) ** 2)

    return params, init(KEY, params, table), loss


def trained(tx, adapter, loss, steps):
    def step(carry, _):
        adapter, state = carry
        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return (optax.apply_updates(adapter, updates), state), loss(adapter)

    (adapter, state), losses = jax.lax.scan(step, (adapter, tx.init(adapter)), length=steps)
    return adapter, state, losses


RANKS = oxs.rules(("head", None), default=oxs.GroupLasso(group_axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        oxs.prox_adam(0.03, RANKS, strength=0.2),
        optax.chain(optax.sgd(0.01), oxs.prox_step(RANKS, 0.5, weight=0.01)),
    ],
    ids=["prox_adam", "sgd"],
)
def test_ranks_die_exactly_and_the_adapter_shrinks(recipe):
    params, adapter, loss = problem()
    ended, _, losses = jax.jit(lambda ad: trained(stack_pairs(recipe), ad, loss, 400))(adapter)
    small = shrink(ended)
    assert 1 <= small["mlp/kernel"].rank < 6
    pair = ended["mlp/kernel"]
    np.testing.assert_array_equal(jnp.any(pair.b != 0, axis=0), jnp.any(pair.a != 0, axis=1))
    one, other = merge(params, ended), merge(params, small)
    np.testing.assert_allclose(one["mlp"]["kernel"], other["mlp"]["kernel"], atol=1e-6)
    np.testing.assert_array_equal(one["head"], other["head"])
    assert losses[-1] < 0.2 * losses[0]


def after_adam(strength, scale=1.0):
    """What is left of the ranks under Adam and a group penalty."""
    _, adapter, loss = problem()
    penalty = oxs.prox_step(RANKS, strength, weight=0.03)
    tx = stack_pairs(optax.chain(optax.adam(0.03), penalty))
    ended, _, _ = jax.jit(lambda ad: trained(tx, ad, lambda x: scale * loss(x), 200))(adapter)
    return ended["mlp/kernel"]


def test_after_adam_the_strength_does_not_depend_on_the_scale_of_the_loss():
    one, other = after_adam(0.6), after_adam(0.6, scale=1e3)
    np.testing.assert_allclose(one.product(), other.product(), atol=1e-2)
    ranks = [shrink({"w": pair})["w"].rank for pair in (one, other)]
    assert 1 <= ranks[0] == ranks[1] < 6


def test_ranks_without_a_gradient_yet():
    """As below a head of zeros: the metric of `prox_adam` is zero there, that of `prox_step` 1."""
    _, adapter, _ = problem()
    nothing = jax.tree.map(jnp.zeros_like, adapter)
    penalty = oxs.prox_step(RANKS, 0.5, weight=0.01)
    plain = stack_pairs(optax.chain(optax.adam(0.01), penalty))
    metric = stack_pairs(oxs.prox_adam(0.01, RANKS, strength=1e-6))
    waiting = stack_pairs(oxs.prox_adam(0.01, RANKS, strength=lambda count: 1e-6 * (count > 0)))
    for tx, left in ((plain, 6), (metric, 0), (waiting, 6)):
        updates, _ = tx.update(nothing, tx.init(adapter), adapter)
        assert shrink(optax.apply_updates(adapter, updates))["mlp/kernel"].rank == left


def test_an_entrywise_transformation_does_not_see_the_stacking():
    _, adapter, loss = problem()
    alone, _, _ = trained(optax.adam(0.1), adapter, loss, 5)
    stacked, _, _ = trained(stack_pairs(optax.adam(0.1)), adapter, loss, 5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), stacked, alone)


def test_no_rank_left():
    params = {"w": normal(4, 3)}
    nothing = jax.tree.map(jnp.zeros_like, init(KEY, params, LoRA(2)))
    small = shrink(nothing)
    assert small["w"].rank == 0
    np.testing.assert_array_equal(merge(params, small)["w"], params["w"])


@pytest.mark.parametrize("n1", [8, 3])
def test_rebalancing_keeps_the_product(n1):
    f, g = normal(n1, 4), normal(6, 4, seed=1)
    new_f, new_g = rebalance_factors(f, g, 0.5)
    np.testing.assert_allclose(new_f @ new_g.T, f @ g.T, atol=1e-5)
    want = 0.25 * np.diag(np.arange(4) < n1)
    np.testing.assert_allclose(new_f.T @ new_f, want, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_rebalancing_makes_the_rate_independent_of_the_start():
    """Slopes of the log error after the switch, against 3e-3 or less without it."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 2)))[0] for n in (8, 6))
    target = jnp.asarray(left @ np.diag([1.0, 0.7]) @ right.T)

    def run(alpha, at, steps=400):
        rng = np.random.default_rng(1)
        pair = Pair(alpha / 3 * rng.normal(size=(4, 6)), alpha * rng.normal(size=(8, 4)))
        tx = rebalance_once(optax.sgd(0.25), 0.5, at=at)
        grad = jax.grad(lambda p: 0.5 * jnp.sum((p["w"].product() - target) ** 2))

        def step(carry, _):
            pair, state = carry
            updates, state = tx.update(grad(pair), state, pair)
            pair = optax.apply_updates(pair, updates)
            return (pair, state), jnp.linalg.norm(pair["w"].product() - target)

        pair = {"w": jax.tree.map(jnp.asarray, pair)}
        _, errors = jax.lax.scan(step, (pair, tx.init(pair)), length=steps)
        return np.log(errors)

    for alpha in (0.1, 0.01):
        with_, without = run(alpha, 120), run(alpha, 10_000)
        np.testing.assert_allclose(with_[:119], without[:119])
        np.testing.assert_allclose(with_[120], with_[119], atol=1e-9)  # the switch moves no product
        assert (with_[150] - with_[250]) / 100 > 0.015
        assert (without[250] - without[-1]) / 150 < 0.012


def test_rebalancing_restarts_the_moments_of_pairs_alone():
    _, adapter, loss = problem()
    tx = rebalance_once(optax.adam(0.1), 0.5, at=3)
    _, before, _ = trained(tx, adapter, loss, 3)
    _, after, _ = trained(tx, adapter, loss, 4)
    mu = after.inner[0].mu
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(mu["mlp/kernel"]))
    assert jnp.any(mu["head"].x != 0)
    assert jnp.any(before.inner[0].mu["mlp/kernel"].b != 0)
    assert after.inner[0].count == 4
    with pytest.raises(ValueError, match="needs params"):
        tx.update(adapter, tx.init(adapter))
    with pytest.raises(ValueError, match="at least 0"):
        rebalance_once(optax.sgd(0.1), 0.5, at=-1)


def everything():
    params = {
        "layers": [{"kernel": normal(6, 4)}, {"kernel": normal(6, 4, seed=1)}],
        "stack": normal(3, 6, 4, seed=2),
        "sparse": normal(6, 4, seed=3),
        "codes": normal(6, 4, seed=4),
        "spectrum": normal(6, 4, seed=5),
        "head": normal(4, 2, seed=6),
    }
    table = oxs.rules(
        ("head", Full()),
        ("sparse", SNELLA(4, sparsity=0.3)),
        ("codes", Codebook(entries=4, groups=2)),
        ("spectrum", SVFit(3, relative=True)),
        ("layers/1", LoRA(2, alpha=3.0, start="svd")),
        default=LoRA(2),
    )
    adapter = init(KEY, params, table)
    return params, jax.tree.map(lambda x: x + 0.1, adapter)


@pytest.mark.slow
def test_a_file_gives_the_same_adapter(tmp_path):
    params, adapter = everything()
    export(tmp_path / "a.safetensors", adapter)
    again = load(tmp_path / "a.safetensors", jax.eval_shape(lambda: params))
    assert jax.tree.structure(again) == jax.tree.structure(dict(sorted(adapter.items())))
    jax.tree.map(np.testing.assert_array_equal, again, dict(adapter))
    names = load_file(tmp_path / "a.safetensors")
    assert names["base_model.model.layers.0.lora_A.weight"].shape == (2, 6)
    assert names["base_model.model.layers.0.lora_B.weight"].shape == (4, 2)
    with pytest.raises(ValueError, match="another model: .* is not a path"):
        load(tmp_path / "a.safetensors", {"w": jnp.ones((2, 2))})


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_peft(tmp_path, rslora):
    a, b = np.asarray(normal(2, 6)), np.asarray(normal(4, 2, seed=1))
    name = "base_model.model.bert.encoder.layer.0.query"
    file, update = tmp_path / "x.safetensors", b @ a
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, file)
    ours = {"encoder": {"layer": [{"query": {"kernel": jnp.zeros((6, 4))}}]}}
    theirs = {"bert": {"encoder": {"layer": [{"query": {"weight": jnp.zeros((4, 6))}}]}}}
    with pytest.raises(ValueError, match="does not say its alpha"):
        load(file, ours)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": 8, "r": 2, "use_rslora": rslora})
    )
    scale = 8 / (2**0.5 if rslora else 2)
    (kernel,) = jax.tree.leaves(merge(ours, load(file, ours)))
    np.testing.assert_allclose(kernel, scale * update.T, rtol=1e-5)
    (weight,) = jax.tree.leaves(merge(theirs, load(file, theirs)))
    np.testing.assert_allclose(weight, scale * update, rtol=1e-5)
    with pytest.raises(ValueError, match="matches no matrix of these parameters"):
        load(file, {"decoder": jnp.zeros((6, 4))})


def test_a_file_of_peft_with_more_than_factors(tmp_path):
    """Alphas of some modules are read; tensors that no adapter here takes are refused."""
    file = tmp_path / "x.safetensors"
    arrays = {
        f"base_model.model.{name}.lora_{x}.weight": np.asarray(normal(*shape))
        for name in ("mlp.up", "mlp.down")
        for x, shape in (("A", (2, 6)), ("B", (4, 2)))
    }
    save_file(arrays, file)
    config = {"lora_alpha": 8, "alpha_pattern": {"up": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    params = {"mlp": {"up": {"kernel": jnp.zeros((6, 4))}, "down": {"kernel": jnp.zeros((6, 4))}}}
    adapter = load(file, params)
    assert adapter["mlp/up/kernel"].scale == 3 and adapter["mlp/down/kernel"].scale == 4
    save_file(arrays | {"mlp.up.lora_magnitude_vector": np.ones(4, np.float32)}, file)
    with pytest.raises(ValueError, match=r"holds 'mlp.up.lora_magnitude_vector' .*as of DoRA"):
        load(file, params)


def test_a_checkpoint_of_the_adapter_alone_goes_on_bit_for_bit(tmp_path):
    params, adapter, loss = problem()
    tx = stack_pairs(oxs.prox_adam(0.03, RANKS, strength=0.1))
    run = jax.jit(lambda adapter, state: step(tx, loss, adapter, state))
    state = tx.init(adapter)
    for _ in range(2):
        adapter, state = run(adapter, state)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.StandardSave((adapter, state)))
        manager.wait_until_finished()
        like = jax.eval_shape(lambda: (adapter, state))
        again = manager.restore(2, args=ocp.args.StandardRestore(like))
    assert jax.tree.structure(again) == jax.tree.structure((adapter, state))
    for _ in range(3):
        adapter, state = run(adapter, state)
        again = run(*again)
    jax.tree.map(np.testing.assert_array_equal, again, (adapter, state))


def step(tx, loss, adapter, state):
    updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
    return optax.apply_updates(adapter, updates), state


@pytest.mark.slow
def test_constants_are_a_function_of_the_weights():
    params, adapter = everything()
    known = constants(params, adapter)
    assert set(known) == {"sparse", "codes", "spectrum", "layers/1/kernel"}
    for x, y in zip(
        jax.tree.leaves(merge(params, adapter)),
        jax.tree.leaves(merge(params, adapter, known)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)
