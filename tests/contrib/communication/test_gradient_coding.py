"""Gradient codes: the published matrices, and every set of stragglers that a code is for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import load, names
from tolerances import GOLDEN

from optax_structured.contrib.communication import gradient_code

CODES = [name for name in names("gradient_coding-") if "H" in load(name).arrays]


def masks(n, s):
    for missing in itertools.combinations(range(n), s):
        yield np.isin(np.arange(n), missing, invert=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CODES)
def test_golden(name):
    golden = load(name)
    meta, arrays = golden.meta, golden.arrays
    code = gradient_code(meta["n"], meta["s"], "cyclic", constraints=arrays["H"])
    assert code.load == pytest.approx(meta["load"])
    np.testing.assert_allclose(code.matrix, arrays["B"], atol=GOLDEN)
    coded = code.encode(jnp.asarray(arrays["g"]))
    np.testing.assert_allclose(coded, arrays["coded"], atol=GOLDEN)
    arrived = np.ones((len(arrays["stragglers"]), meta["n"]), bool)
    np.put_along_axis(arrived, arrays["stragglers"], False, 1)
    weights = jax.jit(jax.vmap(code.decoding))(arrived)
    np.testing.assert_allclose(weights, arrays["A"], atol=GOLDEN)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "n, s, kind", [(6, 2, "repetition"), (6, 2, "cyclic"), (7, 3, None), (4, 0, None), (3, 2, None)]
)
def test_the_sum_comes_back_from_every_set_that_may_arrive(n, s, kind):
    code = gradient_code(n, s, kind)
    assert np.all((code.matrix != 0).sum(1) == s + 1) and code.load == (s + 1) / n
    chunks = {"w": jax.random.normal(jax.random.key(0), (n, 3, 2)), "b": jnp.arange(float(n))}
    sent = code.encode(chunks)
    for arrived in masks(n, s):
        lost = jax.tree.map(
            lambda r, a=arrived: jnp.where(a.reshape(-1, *(1,) * (r.ndim - 1)), r, jnp.nan), sent
        )
        total = code.decode(lost, arrived)
        np.testing.assert_allclose(total["w"], chunks["w"].sum(0), atol=1e-9)
        np.testing.assert_allclose(total["b"], chunks["b"].sum(), atol=1e-9)
        if code.repetition:
            assert set(np.unique(code.decoding(arrived))) <= {0.0, 1.0}
    if s == 0:
        np.testing.assert_array_equal(code.matrix, np.eye(n))


def test_too_few_are_an_error_or_nan():
    for kind in ("repetition", "cyclic"):
        code = gradient_code(4, 1, kind)
        few = jnp.array([True, False, False, False])
        with pytest.raises(ValueError, match="1 of 4 workers have arrived.* 1 stragglers"):
            code.decoding(few)
        assert jnp.all(jnp.isnan(jax.jit(code.decoding)(few)))


@pytest.mark.slow
def test_codes_that_float32_cannot_decode_are_refused():
    with pytest.raises(ValueError, match="64 workers and 8 .*float32.*; take kind='repetition'"):
        gradient_code(64, 8, "cyclic")
    with jax.enable_x64(True):
        code = gradient_code(64, 8, "cyclic")
        g = jax.random.normal(jax.random.key(0), (64, 5))
        arrived = np.arange(64) % 8 != 3
        np.testing.assert_allclose(code.decode(code.encode(g), arrived), g.sum(0), atol=1e-8)
    assert gradient_code(64, 7).repetition
    code = gradient_code(8, 2, "cyclic")
    g = jax.random.normal(jax.random.key(0), (8, 5))
    np.testing.assert_allclose(
        code.decode(code.encode(g), np.arange(8) % 4 != 1), g.sum(0), rtol=1e-4, atol=1e-4
    )


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="groups of stragglers \\+ 1 = 3 .* do not divide 8"):
        gradient_code(8, 2, "repetition")
    with pytest.raises(ValueError, match="stragglers must be from 0 to workers - 1 = 3, got 4"):
        gradient_code(4, 4)
    with pytest.raises(ValueError, match="kind must be 'repetition', 'cyclic' or None"):
        gradient_code(4, 1, "random")
