"""What every adapter does: starts as the model, merges, differentiates, and refuses mistakes."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tolerances import reordered, rounding

import optax_structured as oxs
from optax_structured.adapters import (
    Full,
    LoRA,
    Pair,
    SVFit,
    attach,
    constants,
    describe,
    factored,
    init,
    merge,
    scale_b,
    sub,
)

KEY = jax.random.key(0)
CONV = oxs.Axes(rows=(0, 1, 2), cols=3)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def model():
    return {
        "mlp": {"kernel": normal(6, 4), "bias": normal(4)},
        "stack": normal(3, 6, 4, seed=1),
        "conv": normal(3, 2, 4, 8, seed=2),
        "head": normal(4, 2, seed=3),
    }


TABLES = {
    "lora": oxs.rules(("conv", LoRA(3, axes=CONV)), ("bias", None), default=LoRA(2)),
    "root": oxs.rules(("conv|bias", None), default=LoRA(2, alpha=3.0, scaling="root")),
    "svd": oxs.rules(("conv", LoRA(3, start="svd", axes=CONV)), default=LoRA(2, start="svd")),
    "svfit": oxs.rules(("conv", SVFit(3, axes=CONV)), ("head", Full()), default=SVFit(energy=0.9)),
    "relative": oxs.rules(("conv|bias|head", None), default=SVFit(2, relative=True)),
    "full": oxs.rules(default=Full()),
}


def moved(adapter):
    """Away from the start, so that nothing is zero."""
    return jax.tree.map(lambda x: x + 0.1 * normal(*x.shape, seed=x.size), adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_starts_as_the_pretrained_model_and_then_moves(name):
    params = model()
    adapter = init(KEY, params, TABLES[name])
    known = constants(params, adapter)
    started = merge(params, adapter, known)
    jax.tree.map(np.testing.assert_array_equal, started, params)
    assert jax.tree.structure(started) == jax.tree.structure(params)
    changed = merge(params, moved(adapter), known)
    for path, leaf in oxs.trees.named_leaves(changed):
        same = np.array_equal(leaf, dict(oxs.trees.named_leaves(params))[path])
        assert same == (path not in adapter), path


def test_lora_is_the_sum_of_weight_and_product():
    params = model()
    adapter = moved(init(KEY, params, TABLES["lora"]))
    merged, scale = merge(params, adapter), 2.0
    pair = adapter["mlp/kernel"]
    want = params["mlp"]["kernel"] + scale * pair.a.T @ pair.b.T
    np.testing.assert_allclose(merged["mlp"]["kernel"], want, rtol=rounding(jnp.float32))
    pair = adapter["stack"]
    want = params["stack"] + scale * jnp.einsum("lri,lor->lio", pair.a, pair.b)
    np.testing.assert_allclose(merged["stack"], want, rtol=10 * rounding(jnp.float32))
    pair = adapter["conv"]
    want = params["conv"] + scale * (pair.a.T @ pair.b.T).reshape(3, 2, 4, 8)
    np.testing.assert_allclose(merged["conv"], want, rtol=10 * rounding(jnp.float32))
    assert pair.a.shape == (3, 24) and pair.b.shape == (8, 3)


def test_queries_keys_and_values_in_one_kernel():
    """A pair for each of the three, or one for all."""
    params = {"qkv": normal(6, 3, 4)}
    for axes, product, ranks in (
        (oxs.Axes(0, 2), "lri,lor->ilo", (3, 2, 6)),
        (oxs.Axes(0, (1, 2)), "ri,or->io", (2, 6)),
    ):
        adapter = moved(init(KEY, params, LoRA(2, axes=axes)))
        pair = adapter["qkv"]
        assert pair.a.shape == ranks
        want = params["qkv"] + 2 * jnp.einsum(product, pair.a, pair.b).reshape(6, 3, 4)
        np.testing.assert_allclose(merge(params, adapter)["qkv"], want, atol=1e-6)


def test_gradient_of_merge():
    params = {"w": normal(6, 4)}
    adapter = moved(init(KEY, params, LoRA(2, alpha=3.0)))
    g = normal(6, 4, seed=5)
    got = jax.grad(lambda ad: jnp.vdot(merge(params, ad)["w"], g))(adapter)["w"]
    pair = adapter["w"]
    np.testing.assert_allclose(got.a, 1.5 * pair.b.T @ g.T, rtol=1e-5)
    np.testing.assert_allclose(got.b, 1.5 * g.T @ pair.a.T, rtol=1e-5)


def test_the_svd_start_is_the_best_approximation():
    params = {"w": normal(6, 4)}
    pair = init(KEY, params, LoRA(2, start="svd"))["w"]
    u, s, vt = np.linalg.svd(params["w"])
    np.testing.assert_allclose(pair.product().T, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("relative", [False, True])
def test_gradient_of_singular_values(relative):
    w, g = normal(6, 4, dtype=jnp.float64), normal(6, 4, seed=1, dtype=jnp.float64)
    params = {"w": w}
    adapter = init(KEY, params, SVFit(3, relative=relative))
    known = constants(params, adapter)
    got = jax.grad(lambda ad: jnp.vdot(merge(params, ad, known)["w"], g))(adapter)["w"].shift
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    want = np.diag(u.T @ g @ vt.T)[:3] * (s[:3] if relative else 1)
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_sgd_on_singular_values_is_projected_full_descent():
    w, g = normal(5, 5, dtype=jnp.float64), normal(5, 5, seed=1, dtype=jnp.float64)
    params = {"w": w}
    adapter = init(KEY, params, SVFit(5))
    known = constants(params, adapter)
    gradient = jax.grad(lambda ad: jnp.vdot(merge(params, ad, known)["w"], g))(adapter)
    stepped = jax.tree.map(lambda x, d: x - 0.1 * d, adapter, gradient)
    u, _, vt = np.linalg.svd(w)
    want = w - 0.1 * (u * np.diag(u.T @ g @ vt.T)) @ vt
    np.testing.assert_allclose(merge(params, stepped, known)["w"], want, atol=1e-12)
    assert np.linalg.matrix_rank(merge(params, stepped, known)["w"] - w) <= 5


def test_energy_chooses_the_rank():
    w = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
    for energy, rank in ((0.5, 1), (16 / 30, 1), (0.8, 2), (1.0, 4)):
        assert init(KEY, {"w": w}, SVFit(energy=energy))["w"].shift.shape == (rank,)


def test_data_are_float32_whatever_the_weights_are():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model())
    for table in TABLES.values():
        for leaf in jax.tree.leaves(init(KEY, half, table)):
            assert leaf.dtype == jnp.float32


def test_no_retrace_and_many_adapters_at_once():
    params, traces = {"w": normal(6, 4)}, []

    @jax.jit
    def apply(adapter):
        traces.append(1)
        return merge(params, adapter)["w"]

    adapters = [moved(init(jax.random.key(i), params, LoRA(2))) for i in range(3)]
    alone = jnp.stack([apply(adapter) for adapter in adapters])
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    together = jax.vmap(lambda adapter: merge(params, adapter)["w"])(stacked)
    np.testing.assert_allclose(together, alone, rtol=0, atol=reordered(jnp.float32))


def test_the_body_of_a_scan_merges_its_own_layer():
    params = {"layers": {"w": normal(3, 4, 4), "v": normal(3, 4, 4, seed=1)}, "head": normal(4, 2)}
    table = oxs.rules(("/v", SVFit(2)), ("head", None), default=LoRA(2))
    adapter = moved(init(KEY, params, table))
    known = constants(params, adapter)
    whole = merge(params, adapter, known)

    def body(x, layer):
        weights, adapter, known = layer
        return x @ merge(weights, adapter, known)["w"], merge(weights, adapter, known)

    layers = (params["layers"], sub(adapter, "layers"), sub(known, "layers"))
    _, inside = jax.lax.scan(body, jnp.ones(4), layers)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        inside,
        whole["layers"],
    )


def test_lora_plus_scales_b_alone():
    adapter = init(KEY, model(), oxs.rules(("head", Full()), ("stack", LoRA(2)), default=None))
    ones = jax.tree.map(jnp.ones_like, adapter)
    got, _ = scale_b(16.0).update(ones, scale_b().init(adapter))
    np.testing.assert_array_equal(got["stack"].a, ones["stack"].a)
    np.testing.assert_array_equal(got["stack"].b, 16 * ones["stack"].b)
    np.testing.assert_array_equal(got["head"].x, ones["head"].x)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, x))
        x = nn.Conv(8, (3,))(x)
        return nn.remat(nn.Dense)(3)(nn.DenseGeneral((2, 4))(x).reshape(*x.shape))


def linen():
    x = normal(2, 5, 4)
    params = Small().init(KEY, x)
    return (lambda p, x=x: Small().apply(p, x)), params


def equinox():
    x = normal(4)
    return (lambda model: model(x)), eqx.nn.MLP(4, 3, 8, 2, key=KEY)


OUT_IN = oxs.rules((r"bias", None), default=LoRA(2, axes=oxs.Axes(-1, -2)))
KERNELS = oxs.rules(
    (r"(query|key|value)/kernel", LoRA(2, axes=oxs.Axes(0, (1, 2)))),
    (r"out/kernel", LoRA(2, axes=oxs.Axes((0, 1), 2))),
    (r"DenseGeneral_0/kernel", LoRA(2, axes=oxs.Axes(0, (1, 2)))),
    (r"Conv_0/kernel", LoRA(2, axes=oxs.Axes((0, 1), 2))),
    (r"kernel", LoRA(2)),
    default=None,
)


@pytest.mark.slow
@pytest.mark.parametrize("build, table", [(linen, KERNELS), (equinox, OUT_IN)])
def test_attached_equals_merged(build, table):
    apply, params = build()
    adapter = moved(init(KEY, params, table))

    def loss(way, adapter):
        return jnp.sum(jnp.sin(apply(way(params, adapter))))

    got, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, attach)))(adapter)
    want, expected = jax.jit(jax.value_and_grad(functools.partial(loss, merge)))(adapter)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


class Dense(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype, name="last")(nn.relu(nn.Dense(8, name="first")(x)))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["zero", "svd"])
def test_the_branch_equals_merged(start):
    x = normal(5, 4)
    params = Dense().init(KEY, x)["params"]
    adapter = moved(init(KEY, params, oxs.rules(("kernel", LoRA(2, start=start)), default=None)))
    known = constants(params, adapter)

    def branch(adapter):
        with factored(adapter, known):
            return jnp.sum(jnp.sin(Dense().apply({"params": params}, x)))

    def merged(adapter):
        return jnp.sum(jnp.sin(Dense().apply({"params": merge(params, adapter, known)}, x)))

    got, want = (jax.value_and_grad(f)(adapter) for f in (branch, merged))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.slow
def test_the_branch_keeps_what_merging_into_half_precision_loses():
    """Weights of 256 x 256 and an update of a thousandth of their norm."""
    w, x = normal(256, 256), normal(64, 256, seed=1)
    params = {"params": {"kernel": w.astype(jnp.bfloat16)}}
    adapter = init(KEY, params, LoRA(8))
    pair = adapter["params/kernel"]
    adapter = {"params/kernel": Pair(pair.a, normal(256, 8, seed=2), pair.scale, pair.axes)}
    pair = adapter["params/kernel"]
    small = 1e-3 * jnp.linalg.norm(w) / jnp.linalg.norm(pair.product())
    adapter = {"params/kernel": Pair(pair.a, small * pair.b, pair.scale, pair.axes)}
    layer, x16 = nn.Dense(256, use_bias=False, dtype=jnp.bfloat16), x.astype(jnp.bfloat16)
    wanted = x16.astype(jnp.float32) @ (small * pair.product().T)

    def error(out, frozen):
        added = out.astype(jnp.float32) - frozen.astype(jnp.float32)
        return float(jnp.linalg.norm(added - wanted) / jnp.linalg.norm(wanted))

    wide = functools.partial(jnp.matmul, x16, preferred_element_type=jnp.float32)
    frozen = wide(params["params"]["kernel"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = wide(merge(params, adapter)["params"]["kernel"])
    assert error(merged, frozen) > 0.5
    with factored(adapter):
        branch = layer.apply({"params": {"kernel": jnp.zeros((256, 256), jnp.bfloat16)}}, x16)
    assert error(branch, 0 * frozen) < 0.01


def test_description():
    params = model()
    text = describe(params, init(KEY, params, TABLES["lora"]))
    assert "a (3, 24) and b (8, 3)" in text
    assert text.endswith("beside 300 frozen")


def test_integers_under_a_default_stay_as_they_are():
    params = {"head": normal(4, 2), "ids": jnp.zeros((3, 3), jnp.int32)}
    assert list(init(KEY, params, LoRA(2))) == ["head"]


def test_the_branch_refuses_what_it_cannot_do():
    x = normal(5, 4)
    params = Dense().init(KEY, x)["params"]
    with pytest.raises(ValueError, match="takes LoRA of single Dense kernels"):
        with factored(init(KEY, params, oxs.rules(default=Full()))):
            pass
    adapter = init(KEY, params, oxs.rules(("kernel", LoRA(2)), default=None))
    with pytest.raises(ValueError, match="no Dense layer of 'first/kernel' has run"):
        with factored(adapter):
            pass
    svd = init(KEY, params, oxs.rules(("kernel", LoRA(2, start="svd")), default=None))
    with pytest.raises(ValueError, match="started from an SVD"), factored(svd):
        Dense().apply({"params": params}, x)


def test_training_changes_no_frozen_weight():
    params = model()
    before = jax.tree.map(np.array, params)
    adapter = init(KEY, params, TABLES["lora"])
    tx = optax.adam(0.1)
    state = tx.init(adapter)
    assert optax.tree.size(state) == 2 * optax.tree.size(adapter) + 1

    @jax.jit
    def step(adapter, state):
        def loss(adapter):
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(merge(params, adapter)))

        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    for _ in range(3):
        adapter, state = step(adapter, state)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert not np.array_equal(merge(params, adapter)["head"], params["head"])
