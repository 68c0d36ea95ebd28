"""TangleNAS: the published mixture of convolutions, and sums of slices written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from tolerances import GOLDEN, SAMPLED

from optax_structured.contrib.bilevel import (
    Decision,
    architecture_weights,
    extract,
    superpose,
    superposition_mask,
)

FILES = sorted(path.stem for path in FOLDER.glob("tangle_nas-*.npz"))
OIHW = ("NCHW", "OIHW", "NCHW")


def convolution(x, kernel, bias, padding):
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=OIHW
    )
    return y + bias[:, None, None]


@pytest.mark.parametrize("name", FILES)
def test_golden(name, x64):
    golden = load(name)
    meta, arrays = golden.meta, {k: jnp.asarray(v) for k, v in golden.arrays.items()}
    axes = {"in": Decision(1, tuple(meta["choices_in"]))}
    axes["out"] = Decision(0, tuple(meta["choices_out"]))
    axes["kernel"] = Decision((2, 3), tuple(meta["choices_kernel"]), centred=True)
    decisions = tuple(axes[key] for key in ("in", "out", "kernel"))
    joint = arrays["inputs/weights"].reshape([len(d.sizes) for d in decisions])
    kernel, bias, x = (arrays[k] for k in ("params/kernel", "params/bias", "inputs/x"))
    padding = max(meta["choices_kernel"]) // 2

    def mixed(weights, kernel, bias):
        kernel = superpose(kernel, decisions, weights)
        bias = superpose(bias, (axes["out"],), [weights.sum((0, 2))])
        return convolution(x, kernel, bias, padding)

    y, pull = jax.vjp(mixed, joint, kernel, bias)
    np.testing.assert_allclose(y, arrays["outputs/y"], atol=GOLDEN)
    for got, key in zip(
        pull(arrays["inputs/cotangent"]), ("weights", "kernel", "bias"), strict=True
    ):
        want = arrays[f"outputs/grad_{key}"]
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=GOLDEN)
    # Joint weights that are an outer product give a product of three small factors.
    sums = [joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1))]
    factors = superposition_mask(kernel.shape, decisions, sums)
    outer = jnp.einsum("i,o,k->iok", *sums)
    np.testing.assert_allclose(
        factors, superposition_mask(kernel.shape, decisions, outer), atol=1e-15
    )
    # The selected path: one slice, times its weight, of the selected channels only.
    best = np.unravel_index(np.argmax(joint), joint.shape)
    chosen = extract(kernel, decisions, best)
    y = joint[best] * convolution(
        x[:, : chosen.shape[1]],
        chosen,
        extract(bias, (axes["out"],), best[1:2]),
        chosen.shape[2] // 2,
    )
    np.testing.assert_allclose(y, arrays["outputs/y_argmax"], atol=GOLDEN)


SHAPE = (6, 4, 5, 5)
DECISIONS = (
    Decision(0, (2, 3, 6)),
    Decision(1, (1, 4)),
    Decision((-2, -1), (1, 3, 5), centred=True),
)
WEIGHT = jax.random.normal(jax.random.key(0), SHAPE)


def slices(joint):
    """The published sum: each slice, padded, times its weight."""
    total = np.zeros(SHAPE)
    for index, share in np.ndenumerate(joint):
        part = np.asarray(extract(WEIGHT, DECISIONS, index))
        o, i, k = part.shape[:3]
        low = (5 - k) // 2
        total[:o, :i, low : low + k, low : low + k] += share * part
    return total


def vectors(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [
        jax.nn.softmax(jax.random.normal(k, (len(d.sizes),)))
        for k, d in zip(keys, DECISIONS, strict=True)
    ]


@pytest.mark.slow
def test_one_product_is_the_sum_of_all_slices():
    weights = vectors(1)
    joint = np.einsum("i,o,k->iok", *weights)
    np.testing.assert_allclose(superpose(WEIGHT, DECISIONS, weights), slices(joint), atol=1e-6)
    free = np.asarray(jax.random.normal(jax.random.key(2), joint.shape))
    np.testing.assert_allclose(
        superpose(WEIGHT, DECISIONS, jnp.asarray(free)), slices(free), atol=1e-5
    )


def test_one_hot_weights_are_the_slice_and_zero_outside():
    one_hot = [
        jax.nn.one_hot(choice, len(d.sizes)) for choice, d in zip((1, 0, 1), DECISIONS, strict=True)
    ]
    mixed = superpose(WEIGHT, DECISIONS, one_hot)
    np.testing.assert_array_equal(mixed[:3, :1, 1:4, 1:4], extract(WEIGHT, DECISIONS, (1, 0, 1)))
    assert jnp.sum(mixed != 0) == 3 * 1 * 3 * 3
    largest = [jax.nn.one_hot(len(d.sizes) - 1, len(d.sizes)) for d in DECISIONS]
    np.testing.assert_array_equal(superpose(WEIGHT, DECISIONS, largest), WEIGHT)


def test_linear_in_joint_weights_and_vmapped():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 2, 3))
    mask = jax.jit(functools.partial(superposition_mask, SHAPE, DECISIONS))
    np.testing.assert_allclose(mask(2 * a - b), 2 * mask(a) - mask(b), atol=1e-5)
    both = jax.vmap(mask)(jnp.stack([a, b]))
    np.testing.assert_allclose(both, jnp.stack([mask(a), mask(b)]), atol=1e-6)


def test_float16_weights_keep_their_dtype():
    mixed = superpose(WEIGHT.astype(jnp.float16), DECISIONS, vectors(0))
    assert mixed.dtype == jnp.float16


def test_sharded_weights_stay_where_they_are():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    mixed = jax.jit(lambda w: superpose(w, DECISIONS, vectors(0)))(jax.device_put(WEIGHT, rows))
    assert mixed.sharding.is_equivalent_to(rows, 4)


@pytest.mark.slow
def test_samplers():
    logits, key = jnp.array([0.5, -1.0, 0.0]), jax.random.key(0)
    keys = jax.random.split(key, 4000)
    draw = {
        name: jax.jit(jax.vmap(lambda k, name=name: architecture_weights(logits, name, k)))(keys)
        for name in ("dirichlet", "gumbel", "uniform")
    }
    for name, samples in draw.items():
        np.testing.assert_allclose(samples.sum(-1), 1.0, atol=1e-5, err_msg=name)
    concentration = jax.nn.elu(logits) + 1
    np.testing.assert_allclose(
        draw["dirichlet"].mean(0), concentration / concentration.sum(), atol=SAMPLED
    )
    np.testing.assert_allclose(draw["gumbel"].mean(0), jax.nn.softmax(logits), atol=2 * SAMPLED)
    np.testing.assert_allclose(draw["uniform"].mean(0), 1 / 3, atol=2 * SAMPLED)
    np.testing.assert_allclose(architecture_weights(logits), jax.nn.softmax(logits))
    sparse = architecture_weights(logits, "sparsemax")
    np.testing.assert_allclose(sparse, optax.projections.projection_simplex(logits))
    assert sparse[1] == 0.0


@pytest.mark.parametrize("sampler", ["softmax", "sparsemax", "dirichlet", "gumbel"])
def test_samplers_have_gradients(sampler):
    gradient = jax.jit(
        jax.grad(lambda a: architecture_weights(a, sampler, jax.random.key(1)) @ jnp.arange(3.0))
    )(jnp.array([0.3, 0.1, 0.2]))
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.any(gradient != 0)


def test_gumbel_is_one_hot_with_the_slope_of_a_softmax():
    logits, key = jnp.array([0.3, 0.1, 0.2]), jax.random.key(1)

    def soft(a):
        return jax.nn.softmax((a + jax.random.gumbel(key, a.shape, a.dtype)) / 0.5)

    def hard(a):
        return architecture_weights(a, "gumbel", key, temperature=0.5)

    np.testing.assert_allclose(hard(logits), jax.nn.one_hot(jnp.argmax(soft(logits)), 3), atol=1e-6)
    np.testing.assert_allclose(jax.jacobian(hard)(logits), jax.jacobian(soft)(logits), atol=1e-6)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="a centred window of 2 of 5 entries"):
        superposition_mask(SHAPE, (Decision(2, (2,), centred=True),), [jnp.ones(1)])
    with pytest.raises(ValueError, match="the first 7 of 6 entries"):
        superposition_mask(SHAPE, (Decision(0, (7,)),), [jnp.ones(1)])
    with pytest.raises(ValueError, match=r"decisions of \[3, 2, 3\] choices, but weights of shape"):
        superpose(WEIGHT, DECISIONS, vectors(0)[:2])
    with pytest.raises(ValueError, match="sampler must be one of softmax"):
        architecture_weights(jnp.ones(2), "darts")
    with pytest.raises(ValueError, match="sampler='gumbel' draws; give it a key"):
        architecture_weights(jnp.ones(2), "gumbel")
