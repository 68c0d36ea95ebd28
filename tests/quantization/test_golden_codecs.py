"""Codes and steps of the published quantizers, on fixed inputs."""

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import FLIPPED_CODES, GOLDEN_8BIT, rounding

import optax_structured as oxs
from optax_structured.quantization import codebook
from optax_structured.quantization import rounding as draws_from

DYNAMIC = golden_files.load("quant-dynamic8-codebook").arrays
AFFINE = golden_files.load("quant-affine-group").arrays
DYNAMIC_KINDS = {
    "signed": oxs.Dynamic(),
    "unsigned": oxs.Dynamic(signed=False, published=True),
    "keepsign": oxs.Dynamic(published=True),
}


def names(arrays, prefix):
    return sorted(key.removeprefix(prefix) for key in arrays if key.startswith(prefix))


@pytest.mark.parametrize("signed", [True, False])
def test_codebooks_are_the_published_ones_bit_for_bit(signed):
    expected = DYNAMIC[f"codebook/{'signed' if signed else 'unsigned'}"]
    got = codebook(8, signed)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", names(DYNAMIC, "code/"))
def test_dynamic_codes_are_the_nearest_ones(name):
    leaf, how = name.split("/")
    kind, block, *keepsign = how.split("_")
    codec = DYNAMIC_KINDS[keepsign[0] if keepsign else kind]
    codec = oxs.Dynamic(block=int(block[1:]), signed=codec.signed, published=codec.published)
    encoded = codec.encode(jnp.asarray(DYNAMIC[f"input/{leaf}"]))
    np.testing.assert_array_equal(encoded.absmax, DYNAMIC[f"absmax/{name}"])
    np.testing.assert_array_equal(encoded.codes, DYNAMIC[f"code/{name}"])
    np.testing.assert_array_equal(codec.decode(encoded), DYNAMIC[f"deq/{name}"])


def close(got, expected):
    """XLA multiplies by the reciprocal of a constant, which moves the last bit of a step."""
    np.testing.assert_allclose(got, expected, rtol=rounding("float32"))


def affine(how):
    bits, group = how[1:].split("g")
    return oxs.Affine(int(bits), int(group), published=True)


@pytest.mark.parametrize("name", names(AFFINE, "code/"))
def test_affine_codes_are_the_nearest_ones(name):
    leaf, how = name.split("/")
    codec, x = affine(how), jnp.asarray(AFFINE[f"input/{leaf}"])
    encoded = codec.encode(x)
    for got, key in ((encoded.zero, "zero"), *(((encoded.codes, "code"),) * (codec.bits == 8))):
        np.testing.assert_array_equal(got.ravel(), AFFINE[f"{key}/{name}"].ravel())
    close(encoded.scale.ravel(), AFFINE[f"scale/{name}"].ravel())
    close(codec.decode(encoded, x.shape), AFFINE[f"deq/{name}"])


@pytest.mark.parametrize("name", names(AFFINE, "sr_deq/"))
def test_affine_codes_rounded_with_the_published_draws(name, monkeypatch):
    leaf, how = name.split("/")
    draws = AFFINE[f"uniform/{leaf}"]
    monkeypatch.setattr(draws_from, "uniform", lambda key, x: jnp.asarray(draws).reshape(x.shape))
    codec = affine(how)
    encoded = codec.encode(jnp.asarray(AFFINE[f"input/{leaf}"]), key=jax.random.key(0))
    close(codec.decode(encoded), AFFINE[f"sr_deq/{name}"])


def test_adamw_8bit():
    """Decay comes after the step, and a leaf below the size stays in float32."""
    golden = golden_files.load("quant-adamw8bit-blockwise")
    h = golden.hyperparameters
    b1, b2 = h["betas"]
    tx = oxs.quantized(
        optax.chain(
            optax.adam(h["lr"], b1, b2, h["eps"]),
            oxs.decay_updated_weights(h["lr"], h["weight_decay"]),
        ),
        oxs.Dynamic(block=h["block"], published=True),
        min_size=h["min_8bit_size"],
    )
    current = jax.tree.map(jnp.asarray, golden.start)
    state = tx.init(current)

    @jax.jit
    def step(grads, state, current):
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    for t, (grads, expected) in enumerate(
        zip(golden.steps("grads"), golden.steps("params"), strict=True)
    ):
        current, state = step(grads, state, current)
        for name, value in expected.items():
            error = np.max(np.abs(current[name] - value)) / np.max(np.abs(value))
            assert error <= GOLDEN_8BIT, (t, name)
        adam = state.inner[0][0]
        assert adam.mu["small"].dtype == adam.nu["small"].dtype == jnp.float32
        for field in ("mu", "nu"):
            for name, codes in golden.leaves(f"state/code_{field}").items():
                got = getattr(adam, field)[name]
                apart = np.abs(got.codes.astype(int) - codes[t].astype(int))
                assert apart.max() <= 1 and np.mean(apart > 0) <= FLIPPED_CODES, (t, field, name)
                largest = golden.leaves(f"state/absmax_{field}")[name][t]
                np.testing.assert_allclose(got.absmax.ravel(), largest, rtol=GOLDEN_8BIT)
