"""`couplings`: the groups of known models, and that what dies in groups can be cut without rest."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compact_models import IMAGES, TOKENS, Separable, dead
from tolerances import REORDERED, assert_close

import optax_structured as oxs
from optax_structured.compact import compact, couplings
from optax_structured.training.images.models import ConvNet
from optax_structured.training.lm.model import Functional
from optax_structured.trees import map_named, named_leaves

FEATURES = jnp.linspace(-1, 1, 30).reshape(2, 5, 3)


def listed(groups):
    """Units and their slices: (path, axis, inner) of each name."""
    found = {}
    for pattern, group in groups.pairs:
        path = pattern.strip("^$").replace("\\", "")
        found.setdefault((group.units, group.count), set()).add((path, group.axis, group.inner))
    return [(count, slices) for (_, count), slices in found.items()]


def alike(found, expected):
    order = lambda groups: sorted((count, sorted(slices)) for count, slices in groups)  # noqa: E731
    assert order(listed(found)) == order(expected)


def test_convolutions_and_dense_layers():
    model = ConvNet((3, 4), window=3, padding=1, hidden=5, classes=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    groups = couplings(lambda p, x: model.apply({"params": p}, x), shapes, IMAGES)
    expected = [
        (3, {("Conv_0/bias", 0, 1), ("Conv_0/kernel", 3, 1), ("Conv_1/kernel", 2, 1)}),
        (4, {("Conv_1/bias", 0, 1), ("Dense_0/kernel", 0, 1)}),
        (5, {("Dense_0/bias", 0, 1), ("Dense_1/kernel", 0, 1)}),
    ]
    alike(groups, expected)


def attention(params, x):
    """Fused query, key and value with a bias, in two heads of three entries, and a gated MLP."""
    fused = (x @ params["qkv"] + params["bias"]).reshape(2, 5, 3, 2, 3)
    q, k, v = jnp.moveaxis(fused, 2, 0)
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
    x = x + jnp.einsum("bhqk,bkhe->bqhe", weights, v).reshape(2, 5, 6) @ params["out"]
    return x + (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


ATTENTION = {
    "qkv": (3, 18),
    "bias": (18,),
    "out": (6, 3),
    "gate": (3, 4),
    "up": (3, 4),
    "down": (4, 3),
}


def test_fused_heads_and_a_gated_mlp():
    shapes = {name: jax.ShapeDtypeStruct(n, jnp.float32) for name, n in ATTENTION.items()}
    heads = {("qkv", 1, 3), ("bias", 0, 3), ("out", 0, 3)}
    hidden = {("gate", 1, 1), ("up", 1, 1), ("down", 0, 1)}
    alike(couplings(attention, shapes, FEATURES), [(2, heads), (4, hidden)])


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
def test_the_language_model(stacked):
    model = Functional(8, 1, 2, stacked)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    block, k = ("blocks", 1) if stacked else ("block_0", 0)
    inside = [(f"{block}/attention/{name}/kernel", k + 1, 4) for name in ("query", "key", "value")]
    gates = [(f"{block}/mlp/{name}/kernel", k + 1, 1) for name in ("gate", "up")]
    found = couplings(model.losses, shapes, TOKENS, TOKENS, whole="embed")
    out, down = (f"{block}/attention/out/kernel", k, 4), (f"{block}/mlp/down/kernel", k, 1)
    alike(found, [(2, {*inside, out}), (24, {*gates, down})])
    # With the stream, which an RMSNorm reads: groups of what writes it, and the others follow.
    stream = {
        *((f"{block}/{name}_norm/scale", k, 1) for name in ("attention", "mlp")),
        *((f"{block}/{name}/kernel", k + 1, 1) for name in ("attention/out", "mlp/down")),
        *(("embed/embedding", 1, 1), ("head/kernel", 0, 1), ("norm/scale", 0, 1)),
    }
    found = couplings(model.losses, shapes, TOKENS, TOKENS)
    alike(found, [(2, {*inside}), (24, {*gates}), (8, stream)])


def test_nothing_that_can_go_says_so():
    with pytest.raises(ValueError, match="no unit of this function can be cut"):
        couplings(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, FEATURES)
    with pytest.raises(ValueError, match="whole='embed' matches no parameter path"):
        couplings(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, FEATURES, whole="embed")


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 8)
        x = embed(tokens)
        heads = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
        x = x + heads(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return embed.attend(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        y = nn.relu(nn.GroupNorm(3)(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(x + nn.Conv(4, (3, 3))(y))
        return nn.Dense(3)(x.mean((1, 2)))


def concatenated(params, x):
    a, b = jax.nn.sigmoid(x @ params["a"]), jnp.tanh(x @ params["b"])
    return jnp.concatenate([a @ params["c"], b], axis=-1) @ params["d"]


def linen(model, x):
    return model.apply, model.init(jax.random.key(0), x), (x,)


def language_model(stacked):
    model = Functional(8, 2, 2, stacked)
    return model.losses, model.init(jax.random.key(0)), (TOKENS, TOKENS)


def equinox():
    model = eqx.nn.MLP(3, 2, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, (FEATURES[0],)


def plain(fn, shapes):
    return fn, {name: jnp.ones(shape) for name, shape in shapes.items()}, (FEATURES,)


BRANCHES = {"a": (3, 5), "b": (3, 4), "c": (5, 4), "d": (8, 2)}
MODELS = {
    "conv": lambda: linen(ConvNet((3, 4), window=3, padding=1, hidden=5, classes=2), IMAGES),
    "separable": lambda: linen(Separable(), IMAGES),
    "residual": lambda: linen(Residual(), IMAGES),
    "encoder": lambda: linen(Encoder(), TOKENS % 7),
    "lm": lambda: language_model(False),
    "lm-whole": lambda: language_model(False),
    "lm-stacked": lambda: language_model(True),
    "equinox": equinox,
    "concatenated": lambda: plain(
        concatenated, {"a": (3, 5), "b": (3, 4), "c": (5, 4), "d": (8, 2)}
    ),
    "fused": lambda: plain(attention, ATTENTION),
}


def killed(params, groups, share=0.4):
    """Zeros in all slices of some units of every name, by the spec of each leaf alone."""
    random, chosen = np.random.default_rng(0), {}
    table = {pattern.strip("^$").replace("\\", ""): group for pattern, group in groups.pairs}

    def one(path, leaf):
        group = table.get(path)
        if group is None:
            return leaf
        gone = chosen.setdefault(group.units, random.random(group.count) < share)
        gone[0], gone[-1] = True, False
        return group.leaf(jnp.where(gone[:, None], 0, group.rows(leaf)), leaf.shape)

    return map_named(one, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_dies_in_groups_can_be_cut(name):
    fn, params, inputs = MODELS[name]()
    params = dead(params)
    groups = couplings(fn, params, *inputs, whole="embed" if name == "lm-whole" else None)
    params = killed(params, groups)
    small = compact(fn, params, *inputs)
    found, expected = jax.jit(small.fn)(small.params, *inputs), jax.jit(fn)(params, *inputs)
    assert_close(found, expected, 20 * REORDERED["float32"])
    assert small.report.blocked == 0
    before, after = dict(named_leaves(params)), dict(named_leaves(small.params))
    for pattern, group in groups.pairs:  # every dead unit of every leaf is gone
        path = pattern.strip("^$").replace("\\", "")
        gone = int((~group.support(before[path])).sum())
        entries = before[path].shape[group.axis]
        assert after[path].shape[group.axis] == entries - entries // group.count * gone


@pytest.mark.slow
def test_training_leaves_nothing_dead_that_cannot_be_cut():
    model = ConvNet((4,), window=3, padding=1, hidden=6, classes=2)
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    labels = (x.mean((1, 2, 3)) > 0).astype(int)
    params = model.init(jax.random.key(0), x)
    groups = couplings(model.apply, params, x)

    def loss(params):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = oxs.prox_adam(1e-2, groups, 3e-3)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]

    trained = train(params)
    small = compact(model.apply, trained, x)
    assert 0 < small.report.params[1] < small.report.params[0] / 2
    assert small.report.blocked == 0
    assert_close(small.fn(small.params, x), model.apply(trained, x), 20 * REORDERED["float32"])
