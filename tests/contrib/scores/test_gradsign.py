"""GradSign: the published integers, and what signs of gradients cannot depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from jax.sharding import PartitionSpec as P

import optax_structured as oxs
from optax_structured.contrib.scores import gradsign

FILES = sorted(path.stem for path in FOLDER.glob("gradsign-*.npz"))
OIHW = ("NCHW", "OIHW", "NCHW")


def cnn(params, x, meta):
    """The network that `meta` describes."""

    def convolution(name, x, stride):
        y = jax.lax.conv_general_dilated(
            x, params[f"{name}.weight"], (stride, stride), [(1, 1)] * 2, dimension_numbers=OIHW
        )
        return y + params.get(f"{name}.bias", jnp.zeros(y.shape[1]))[:, None, None]

    def normalise(x):
        if meta["bn_mode"] == "train":
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        else:
            mean, var = params["bn.running_mean"], params["bn.running_var"]
        scale = params["bn.weight"] / jnp.sqrt(var + meta["bn_eps"])
        return (x - mean[:, None, None]) * scale[:, None, None] + params["bn.bias"][:, None, None]

    x = convolution("conv1", x, 1)
    x = jax.nn.relu(normalise(x) if meta["batch_norm"] else x)
    x = jax.nn.relu(convolution("conv2", x, 2)).reshape(len(x), -1)
    x = jax.nn.relu(x @ params["fc1.weight"].T + params["fc1.bias"])
    return x @ params["fc2.weight"].T + params["fc2.bias"]


@pytest.mark.parametrize("name", FILES)
def test_golden(name, x64):
    golden = load(name)
    params = {k: jnp.asarray(v) for k, v in golden.leaves("params").items()}
    batch = {k: jnp.asarray(v) for k, v in golden.leaves("inputs").items()}
    published = golden.leaves("outputs/sign_sum")

    def loss(params, batch):
        logits = cnn(params, batch["x"], golden.meta)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    counted = oxs.rules((rf"^({'|'.join(published)})\.weight$", True), default=False)
    found = gradsign(loss, params, batch, counted=counted)
    for layer, sums in published.items():
        np.testing.assert_array_equal(found.sign_sums[f"{layer}.weight"], sums)
    assert found.score == golden.arrays["outputs/score"]
    counts = sum(sums.size for sums in published.values())
    np.testing.assert_allclose(found.agreement, found.score / (golden.meta["n"] * counts))
    assert found.sign_sums["fc1.bias"] is None


PARAMS = {
    "first": {"kernel": jax.random.normal(jax.random.key(0), (4, 6)), "bias": jnp.ones(6) / 10},
    "last": {"kernel": jax.random.normal(jax.random.key(1), (6, 3)), "bias": jnp.zeros(3)},
}
BATCH = {
    "x": jax.random.normal(jax.random.key(2), (16, 4)),
    "y": jnp.arange(16) % 3,
}


def mlp_loss(params, batch, scale=1.0):
    x = jax.nn.relu(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    logits = x @ params["last"]["kernel"] + params["last"]["bias"]
    return scale * optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


score = jax.jit(functools.partial(gradsign, mlp_loss), static_argnames="counted")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_order_and_scale_do_not_matter():
    want = score(PARAMS, BATCH)
    order = jax.random.permutation(jax.random.key(3), 16)
    same(score(PARAMS, jax.tree.map(lambda x: x[order], BATCH)), want)
    same(
        jax.jit(lambda p, b: gradsign(functools.partial(mlp_loss, scale=8.0), p, b))(PARAMS, BATCH),
        want,
    )


@pytest.mark.slow
def test_examples_that_are_alike():
    """n for each nonzero gradient; units that are dead give zeros."""
    one = jax.tree.map(lambda x: jnp.repeat(x[:1], 7, 0), BATCH)
    found = score(PARAMS, one)
    gradient = jax.grad(mlp_loss)(PARAMS, jax.tree.map(lambda x: x[:1], BATCH))
    signs = [jnp.sign(gradient[layer]["kernel"]) for layer in ("first", "last")]
    assert 0 < sum(jnp.sum(s == 0) for s in signs)
    for layer, sign in zip(("first", "last"), signs, strict=True):
        np.testing.assert_array_equal(found.sign_sums[layer]["kernel"], 7 * sign)
    assert found.score == 7 * sum(jnp.sum(s != 0) for s in signs)


def test_opposite_gradients_cancel():
    found = gradsign(
        lambda params, batch: jnp.sum(batch @ params["kernel"]),
        {"kernel": jnp.ones(3)},
        jnp.array([[1.0, 2.0, 3.0], [-1.0, -5.0, -0.1]]),
    )
    assert found.score == 0 == found.agreement


def test_all_parameters_or_some():
    everything = score(PARAMS, BATCH, counted=oxs.rules(default=True))
    assert everything.sign_sums["first"]["bias"].shape == (6,)
    assert everything.score > score(PARAMS, BATCH).score


def test_a_gradient_that_is_nan_counts_nothing():
    def loss(params, batch):
        return jnp.sum(jnp.sqrt(batch) * params["kernel"])

    found = gradsign(loss, {"kernel": jnp.ones(2)}, jnp.array([[1.0, 1.0], [1.0, -1.0]]))
    assert found.score == 2


def test_half_precision_is_counted_exactly():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    many = jax.tree.map(lambda x: jnp.repeat(x[:1], 300, 0), BATCH)
    found = score(half, many)
    assert jnp.max(jnp.abs(found.sign_sums["last"]["kernel"])) == 300


def test_eight_devices_add_signs_first():
    """Absolute values of sums by device would be another, larger, score."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for check_vma in (True, False):
        sharded = jax.jit(
            jax.shard_map(
                functools.partial(gradsign, mlp_loss, axis_name="data"),
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=P(),
                check_vma=check_vma,
            )
        )
        same(sharded(PARAMS, BATCH), score(PARAMS, BATCH))
    parts = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), BATCH)
    by_device = jax.vmap(functools.partial(gradsign, mlp_loss), (None, 0))(PARAMS, parts)
    assert by_device.score.sum() > score(PARAMS, BATCH).score


def test_vmap_over_initialisations():
    two = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), PARAMS)
    found = jax.vmap(functools.partial(gradsign, mlp_loss), (0, None))(two, BATCH)
    assert found.score.shape == (2,)
    assert found.score[0] == score(PARAMS, BATCH).score


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="matches no parameter path; the nearest paths are"):
        gradsign(mlp_loss, {"weight": jnp.ones(2)}, BATCH)
    with pytest.raises(ValueError, match="counts no parameter; give it rules with a True"):
        gradsign(mlp_loss, PARAMS, BATCH, counted=oxs.rules(default=False))
