"""Stochastic rounding: to one of the two neighbours, with the right mean and variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import STANDARD_ERRORS

import optax_structured as oxs

DRAWS = 20_000
FRACTIONS = np.array([0.0, 0.01, 0.25, 0.5, 0.8, 0.999], np.float32)


def assert_two_point(samples, low, high, x):
    """(DRAWS, n) samples are low or high, with the mean x and the variance that follows."""
    assert np.all((samples == low) | (samples == high))
    share = (x - low) / np.where(high > low, high - low, 1)
    variance = (high - low) ** 2 * share * (1 - share)
    error = np.abs(samples.mean(0, dtype=np.float64) - x)
    assert np.all(error <= STANDARD_ERRORS * np.sqrt(variance / DRAWS))
    # The variance of (s - x)^2 of a number with two values.
    spread = np.abs(high - low) * np.abs(1 - 2 * share) * np.sqrt(variance / DRAWS)
    found = np.mean((samples - x.astype(np.float64)) ** 2, 0)
    assert np.all(np.abs(found - variance) <= STANDARD_ERRORS * spread + 1e-9 * variance)


def many(x):
    return jnp.asarray(np.broadcast_to(x, (DRAWS, x.size)))


@pytest.mark.parametrize("whole", [0.0, 7.0, -3.0])
def test_rounding_to_integers(whole):
    x = whole + FRACTIONS
    samples = np.asarray(
        oxs.quantization.round_stochastically(many(x), jax.random.key(0)), np.float64
    )
    assert_two_point(samples, np.floor(x), np.ceil(x), x.astype(np.float64))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_to_the_codes_of_a_group(bits):
    x = np.array([-1.0, 1.7, 0.0, 0.3, -0.123, 1.0], np.float32)
    codec = oxs.Affine(bits, group=6)
    encoded = codec.encode(many(x), key=jax.random.key(1))
    samples = np.asarray(codec.decode(encoded, (DRAWS, 6)), np.float64)
    step = float(encoded.scale.ravel()[0])
    assert np.unique(encoded.scale).size == 1
    kept = samples / step
    assert_two_point(np.rint(kept)[:, 2:], *neighbours(x[2:] / step), x[2:] / step)
    np.testing.assert_allclose(kept, np.rint(kept), atol=1e-3)
    # An extreme is cut off above, and its expectation falls short by half a step at most.
    assert np.all(np.abs(samples[:, :2].mean(0) - x[:2]) <= step / 2)


def neighbours(x):
    return np.floor(x), np.ceil(x)


def bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_rounding_to_bfloat16():
    x = np.array([1.0, 1.001, -0.3, 3e-20, 65_537.0, -1e30], np.float32)
    samples = oxs.quantization.cast_stochastically(many(x), jax.random.key(2))
    assert samples.dtype == jnp.bfloat16
    near = (x.view(np.uint32) >> 16).astype(np.uint16)
    ends = np.sort([bfloat16(near), bfloat16(near + 1)], 0).astype(np.float64)
    exact = (x.view(np.uint32) & 0xFFFF) == 0
    low, high = np.where(exact, x, ends[0]), np.where(exact, x, ends[1])
    assert_two_point(np.asarray(samples, np.float64), low, high, x.astype(np.float64))


def test_everything_that_bfloat16_has_stays():
    """All normal numbers, infinity and NaN; XLA takes the smallest ones for 0."""
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80 != 0) | (bits & 0x7FFF == 0)]
    x = bfloat16(bits)
    kept = np.asarray(
        oxs.quantization.cast_stochastically(jnp.asarray(x), jax.random.key(3)), np.float32
    )
    np.testing.assert_array_equal(kept, x)
    assert np.isinf(x).sum() == 2 and np.isnan(x).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_whole_numbers_stay_in_their_dtype(dtype):
    x = jnp.arange(-5, 6).astype(dtype)
    kept = oxs.quantization.round_stochastically(x, jax.random.key(4))
    assert kept.dtype == x.dtype
    np.testing.assert_array_equal(kept, x)


def test_the_same_key_gives_the_same_draws():
    x = many(FRACTIONS)[:100]
    for rounded in (oxs.quantization.round_stochastically, oxs.quantization.cast_stochastically):
        first, again, other = (rounded(x, jax.random.key(k)) for k in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert jnp.any(first != other)
