"""Rounds of Cholesky factorisations: orthonormal rows for any rows, as by Householder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import ORTHONORMAL

from optax_structured.meshes.placement import product
from optax_structured.projectors import orthonormal as room
from optax_structured.projectors.orthonormal import cholesky_qr, householder, orthonormal

SIZE, LENGTH, RANK = 96, 128, 24
I = np.arange(1, SIZE + 1)  # noqa: E741
SPECTRA = {
    "flat": I**-0.5,
    "steep": I**-1.5,
    "exponential": 10.0 ** (-I / 8),
    "few": np.where(I <= 5, 1.0, 0.0),
    "one": np.where(I == 1, 1.0, 1e-8),
}


def gradient(sigma):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, SIZE)))[0] for n in (SIZE, LENGTH))
    return np.asarray((u * sigma) @ v.T, np.float32)


def defect(rows):
    rows = np.asarray(rows, np.float64)
    return np.abs(rows @ rows.T - np.eye(len(rows))).max()


@pytest.mark.parametrize("name", SPECTRA)
def test_as_good_as_householder_in_float32(name):
    """From a cold start, which is as ill-conditioned as the square of the spectrum, and warm."""
    g = gradient(SPECTRA[name])
    cold = np.random.default_rng(1).normal(size=(RANK, SIZE)).astype(np.float32)
    noise = np.random.default_rng(2).normal(size=g.shape) * np.linalg.norm(g) / g.size**0.5 / 2
    warm = np.linalg.svd(g + noise)[0][:, :RANK].T.astype(np.float32)
    for start in (cold, warm):
        first = start @ g
        rows = jnp.asarray(first / np.abs(first).max() @ g.T)
        q, reference = jax.jit(cholesky_qr)(rows), householder(rows)
        assert defect(q) < ORTHONORMAL["float32"]
        held, possible = (np.linalg.norm(np.asarray(x, np.float64) @ g) for x in (q, reference))
        assert held >= 0.9999 * possible


def three_passes(a, b, precision, transpose_b=False):
    """A product of precision HIGH on a TPU, which CPUs have not: three of bfloat16 numbers."""
    del precision

    def halves(x):
        high = jax.lax.reduce_precision(x, 8, 7)
        return high, jax.lax.reduce_precision(x - high, 8, 7)

    (a, a_rest), (b, b_rest) = halves(a), halves(b)
    pairs = ((a, b), (a, b_rest), (a_rest, b))
    return sum(product(x, y, transpose_b=transpose_b) for x, y in pairs)


@pytest.mark.parametrize("name", ["flat", "exponential", "few"])
def test_three_passes_of_bfloat16_are_enough(name, monkeypatch):
    """What TPUs run."""
    g = gradient(SPECTRA[name])
    cold = np.random.default_rng(1).normal(size=(RANK, SIZE)).astype(np.float32)
    rows = jnp.asarray(cold @ g @ g.T)
    monkeypatch.setattr(room, "product", three_passes)
    q, reference = jax.jit(lambda x: cholesky_qr(x))(rows), householder(rows)
    assert defect(q) < ORTHONORMAL["float32"]
    held, possible = (np.linalg.norm(np.asarray(x, np.float64) @ g) for x in (q, reference))
    assert held >= 0.9999 * possible


def test_rows_without_a_direction_of_their_own():
    rows = jnp.zeros((5, 9)).at[1].set(1.0).at[3].set(2.0).at[4, 0].set(1e-15)
    for scale in (1e-20, 1.0, 1e20):
        q = jax.jit(cholesky_qr)(scale * rows)
        assert defect(q) < ORTHONORMAL["float32"]
        for direction in (jnp.ones(9) / 3, jnp.eye(9)[0]):  # theirs are all there
            np.testing.assert_allclose(jnp.linalg.norm(q @ direction), 1, rtol=1e-5)
    assert jnp.isnan(cholesky_qr(rows.at[0, 0].set(jnp.nan))).any()


def test_flips_pass_through():
    rows = jax.random.normal(jax.random.key(0), (3, 4, 9))
    signs = jnp.asarray([1.0, -1.0, -1.0, 1.0])[:, None]
    np.testing.assert_array_equal(cholesky_qr(signs * rows), signs * cholesky_qr(rows))


def test_large_factors_are_inverted_block_by_block():
    rows = jax.random.normal(jax.random.key(0), (150, 200))
    q = cholesky_qr(rows)
    assert defect(q) < ORTHONORMAL["float32"]
    np.testing.assert_allclose(q, householder(rows), atol=1e-4)


def test_the_program_chooses_not_the_process():
    rows = jax.ShapeDtypeStruct((4, 9), jnp.float32)
    traced = jax.jit(orthonormal).trace(rows)
    tpu, cpu = (traced.lower(lowering_platforms=(x,)).as_text().lower() for x in ("tpu", "cpu"))
    assert "cholesky" in tpu and "householder" not in tpu
    assert "geqrf" in cpu and "potrf" not in cpu


@pytest.mark.parametrize("entries", [1, 3])
def test_rows_that_span_less_are_completed(entries):
    """Of exact zeros no rounding leads out of the span, as of an embedding with few rows read."""
    rows = np.zeros((8, 40), np.float32)
    rows[:, :entries] = np.random.default_rng(3).normal(size=(8, entries))
    q = cholesky_qr(jnp.asarray(rows))
    assert defect(q) < 1e-5
    assert jnp.linalg.norm(q[:, :entries]) ** 2 > entries - 1e-5  # the span is in it
