"""What holds for every array that a codec stores, whatever its shape and its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import rounding

import optax_structured as oxs
from optax_structured.quantization import codebook
from optax_structured.quantization.packing import pack, unpack

BLOCK, SIZE = 16, 40  # the last block is shorter
FLOAT32 = rounding("float32")


@st.composite
def entries(draw):
    """Numbers over many decades, zeros, and numbers next to those where rounding turns."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    decades = random.uniform(-draw(st.integers(0, 12)), 0, SIZE)
    numbers = codebook(draw(st.sampled_from([4, 8])), draw(st.booleans())).astype(np.float64)
    turns = (
        (numbers[1:] + numbers[:-1]) / 2 * random.choice([1 - 1e-7, 1, 1 + 1e-7], len(numbers) - 1)
    )
    kinds = [
        10**decades * random.choice([-1, 1], SIZE),
        random.choice(turns, SIZE),
        random.choice(numbers, SIZE),
        np.zeros(SIZE),
    ]
    x = np.choose(random.choice(4, SIZE, p=random.dirichlet(np.ones(4))), kinds)
    # Blocks of the same size, so that turns are turns; XLA takes what is below 1e-38 for 0.
    return (x * 2.0 ** draw(st.integers(-60, 100))).astype(np.float32)


every_dynamic = pytest.mark.parametrize(
    "codec",
    [
        oxs.Dynamic(bits, BLOCK, signed, published=published)
        for bits in (8, 4)
        for signed in (True, False)
        for published in (False, True)
    ],
    ids=repr,
)
every_affine = pytest.mark.parametrize("codec", [oxs.Affine(8, BLOCK), oxs.Affine(4, BLOCK)])
both_bits = pytest.mark.parametrize("bits", [8, 4])
both_signs = pytest.mark.parametrize("signed", [True, False])


@functools.cache
def stored(codec):
    """What is left of an array after it was encoded and decoded."""
    apply = jax.jit(lambda x: codec.decode(codec.encode(x), x.shape))
    return lambda x: np.asarray(apply(x))


def codes(codec, kept, scale):
    """The places in the codebook of decoded entries."""
    numbers = codebook(codec.bits, codec.signed)
    ratio = kept / np.where(scale == 0, 1, scale)
    return np.argmin(np.abs(numbers - ratio[:, None]), 1)


def per_entry(x):
    """(SIZE,) of one number a block."""
    return np.repeat(x, BLOCK)[:SIZE]


def largest(x):
    return per_entry([np.abs(part).max() for part in np.split(x, [BLOCK, 2 * BLOCK])])


@both_bits
@both_signs
@given(scale=st.floats(2.0**-60, 2.0**100, width=32))
def test_what_a_code_stands_for_is_stored_exactly(bits, signed, scale):
    numbers = codebook(bits, signed) * np.float32(scale)
    kept = stored(oxs.Dynamic(bits, 2**bits, signed))(numbers)
    np.testing.assert_array_equal(kept, numbers)


@every_dynamic
@given(x=entries())
def test_the_nearest_number_is_taken(codec, x):
    x = x if codec.signed else np.abs(x)
    kept, scale = stored(codec)(x), largest(x).astype(np.float64)
    numbers = codebook(codec.bits, codec.signed).astype(np.float64)
    distance = np.abs(scale[:, None] * numbers - x[:, None])
    if codec.published and codec.signed:
        distance[(x < 0)[:, None] & (numbers >= 0)] = np.inf
    elif not codec.published and not codec.signed:
        distance[(x > 0)[:, None] & (numbers == 0)] = np.inf
    assert np.all(np.abs(kept - x) <= distance.min(1) + FLOAT32 * scale)


@every_dynamic
@given(x=entries())
def test_an_error_is_at_most_half_the_gap_to_the_next_number(codec, x):
    """Except where a sign is kept, or a second moment is kept above 0."""
    x = x if codec.signed else np.abs(x)
    kept, scale = stored(codec)(x), largest(x).astype(np.float64)
    numbers = codebook(codec.bits, codec.signed).astype(np.float64)
    code = codes(codec, kept, scale)
    gap = np.diff(numbers, prepend=-1.0, append=numbers[-1]) * (codec.signed or 1)
    half = scale * np.maximum(gap[code], gap[code + 1]) / 2
    moved = np.abs(x) <= scale * np.min(np.abs(numbers[numbers != 0]))
    assert np.all((np.abs(kept - x) <= half + FLOAT32 * scale) | moved)


@every_dynamic
@given(x=entries())
def test_larger_entries_of_a_block_never_decode_to_less(codec, x):
    x[BLOCK:] = 0
    x[:BLOCK].sort()
    kept = stored(codec)(x)
    assert np.all(np.diff(kept[:BLOCK]) >= 0)


@pytest.mark.parametrize("codec", [oxs.Dynamic(8, BLOCK), oxs.Affine(8, BLOCK)], ids=repr)
@given(x=entries(), order=st.permutations(range(BLOCK)))
def test_the_order_inside_a_block_does_not_matter(codec, x, order):
    kept = stored(codec)(x)
    shuffled = np.concatenate([x[:BLOCK][order], x[BLOCK:]])
    again = stored(codec)(shuffled)
    np.testing.assert_array_equal(again[:BLOCK], kept[:BLOCK][order])
    np.testing.assert_array_equal(again[BLOCK:], kept[BLOCK:])


@both_bits
@given(x=entries())
def test_a_positive_second_moment_never_becomes_zero_and_zero_stays(bits, x):
    x = np.abs(x)
    kept = stored(oxs.Dynamic(bits, BLOCK, signed=False))(x)
    np.testing.assert_array_equal(kept == 0, x == 0)


@both_bits
def test_the_published_rounding_loses_small_second_moments(bits):
    x = np.zeros(SIZE, np.float32)
    x[:2] = 1.0, 1e-9
    kept = stored(oxs.Dynamic(bits, BLOCK, signed=False, published=True))(x)
    assert kept[1] == 0


@both_bits
@both_signs
def test_ties_go_to_the_lower_code(bits, signed):
    """The published kernels search among midpoints, and stop at the first that is not below."""
    numbers = codebook(bits, signed)
    middle = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    x = np.append(middle, np.float32(1))
    kept = stored(oxs.Dynamic(bits, x.size + x.size % 2, signed, published=not signed))(x)
    np.testing.assert_array_equal(kept[:-1], numbers[:-1])


@every_dynamic
def test_the_largest_entry_of_a_block_is_exact(codec):
    x = np.linspace(0.01, 3.7, SIZE, dtype=np.float32)
    kept = stored(codec)(x)
    for last in (BLOCK - 1, 2 * BLOCK - 1, SIZE - 1):
        assert kept[last] == x[last]


@pytest.mark.slow
@every_affine
@given(x=entries(), sign=st.sampled_from(["any", "positive", "negative", "constant"]))
def test_an_error_is_at_most_half_a_step(codec, x, sign):
    change = {
        "positive": np.abs,
        "negative": lambda x: -np.abs(x),
        "constant": lambda x: 0 * x + x[0],
    }
    x = change.get(sign, np.copy)(x)
    kept = stored(codec)(x)
    step = per_entry(codec.encode(jnp.asarray(x)).scale)
    assert np.all(np.abs(kept - x) <= step * (0.5 + 2**codec.bits * FLOAT32))
    assert np.all(kept[x == 0] == 0)


@every_affine
def test_a_constant_group_is_exact(codec):
    """Its only number is an end of its range."""
    for value in (0.37, -5.0, 0.0):
        x = np.full(SIZE, value, np.float32)
        np.testing.assert_allclose(stored(codec)(x), x, rtol=FLOAT32)


def test_packing_keeps_every_code():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 32)), jnp.uint8)
    packed = pack(codes)
    assert packed.shape == (3, 16) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed), codes)


CODECS = [oxs.Dynamic(8), oxs.Dynamic(4, 128), oxs.Affine(8), oxs.Affine(4, 32)]
SHAPES = [(), (0,), (0, 3), (3, 0), (1,), (3,), (7, 5), (300,), (3, 130), (2, 4, 32), (2, 256)]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


@pytest.mark.slow
@every_codec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(codec, shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    encoded = codec.encode(x)
    block = codec.block if isinstance(codec, oxs.Dynamic) else codec.group
    kept = codec.decode(encoded, shape)
    assert kept.shape == shape and kept.dtype == jnp.float32
    assert encoded.codes.dtype == jnp.uint8
    assert encoded[1].size == -(-x.size // block)
    if codec.bits == 8:
        assert encoded.codes.shape == shape
        np.testing.assert_array_equal(codec.decode(encoded), kept)
    else:
        assert encoded.codes.nbytes <= (x.size + block) / 2  # the last block is whole
    bound = 0.01 if codec.bits == 8 else 0.15
    assert np.max(np.abs(kept - x), initial=0.0) <= bound * np.max(np.abs(x), initial=0.0)


@pytest.mark.slow
def test_scales_lie_beside_the_axes_that_no_block_crosses():
    assert oxs.Dynamic().encode(jnp.ones((6, 512))).absmax.shape == (6, 2)
    assert oxs.Dynamic().encode(jnp.ones((2, 4, 128))).absmax.shape == (2, 2)
    assert oxs.Dynamic().encode(jnp.ones((512, 3))).absmax.shape == (6,)
    assert oxs.Affine(4, 8).encode(jnp.ones((3, 5)), batch=1).scale.shape == (3, 1)


@pytest.mark.slow
@every_codec
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.usefixtures("x64")
def test_other_dtypes(codec, dtype):
    x = jnp.asarray([1.0, -0.25, 0.0, 0.5], dtype)
    kept = codec.decode(codec.encode(x), (4,))
    assert kept.dtype in (jnp.float32, jnp.float64)
    assert jnp.max(jnp.abs(kept - x)) <= 0.1 and kept[2] == 0


@pytest.mark.slow
@every_codec
@pytest.mark.parametrize("codec_of", ["eager", "jit"])
def test_what_is_not_finite(codec, codec_of):
    """Infinity is a large number. NaN is 0 in equal steps, and spoils its block otherwise."""
    encode = jax.jit(codec.encode) if codec_of == "jit" else codec.encode
    affine = isinstance(codec, oxs.Affine)
    x = jnp.asarray([jnp.inf, -jnp.inf, 0.0, 1.0])
    kept = np.asarray(codec.decode(encode(x), x.shape))
    largest = np.finfo(np.float32).max / (2 if affine else 1)
    lowest = -largest if getattr(codec, "signed", True) else 0
    assert kept[2] == 0
    np.testing.assert_allclose(kept[:2], [largest, lowest], rtol=0.15 if codec.bits == 4 else 0.01)
    blocks = np.ones(512, np.float32)
    blocks[3] = np.nan
    kept = np.asarray(codec.decode(encode(jnp.asarray(blocks)), blocks.shape))
    np.testing.assert_allclose(kept[256:], 1, rtol=FLOAT32)
    assert kept[3] == 0 if affine else np.isnan(kept[3])


@pytest.mark.slow
@every_codec
def test_codecs_batch_under_vmap(codec):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 40)), jnp.float32)
    codes = jax.vmap(codec.encode)(x)
    kept = jax.vmap(lambda c: codec.decode(c, (40,)))(codes)
    for row, expected in zip(kept, x, strict=True):
        np.testing.assert_allclose(row, codec.decode(codec.encode(expected), (40,)), rtol=FLOAT32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oxs.Dynamic(bits=5), "Dynamic has 4 or 8 bits, got bits=5"),
        (lambda: oxs.Affine(bits=32), "Affine has 4 or 8 bits, got bits=32"),
        (lambda: oxs.Dynamic(block=1), "block must be at least 2 entries, got 1"),
        (lambda: oxs.Dynamic(block=2.5), "block must be a Python int, a number of entries, got"),
        (lambda: oxs.Dynamic(4, block=7), "block must be even at 4 bits"),
        (lambda: oxs.Affine(4, group=7), "group must be even at 4 bits"),
        (lambda: oxs.Affine(group=True), "group must be a Python int, a number of entries, got"),
    ],
)
def test_misuse(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
