"""Robust recovery of a low-rank matrix (SubGM) on our step: published run, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import GOLDEN, assert_close

from optax_structured.step_sizes import decaying_normalized_step


def signs(A, y, U):
    """Q: averaged measurement matrices, signed by their residuals."""
    return jnp.einsum("m,mij->ij", jnp.sign(jnp.einsum("mij,ik,jk->m", A, U, U) - y), A) / len(y)


def spectral_start(A, y, k, alpha):
    """The k leading eigenvectors of the averaged signed measurements, small."""
    C = jnp.einsum("m,mij->ij", jnp.sign(y), A + A.mT) / (2 * len(y))
    values, vectors = jnp.linalg.eigh(C)
    roots = jnp.sqrt(jnp.maximum(values[-k:], 0) / jnp.linalg.norm(C))
    return alpha * vectors[:, -k:] * roots


def recover(A, y, U, init, decay, steps):
    """U U^T, the step length and the loss before it, at each step."""
    loss = lambda U: jnp.mean(jnp.abs(y - jnp.einsum("mij,ik,jk->m", A, U, U)))  # noqa: E731
    optimizer = decaying_normalized_step(init, decay)

    def step(carry, _):
        U, state = carry
        value, grad = jax.value_and_grad(loss)(U)
        n = jnp.linalg.norm(signs(A, y, U))
        updates, state = optimizer.update(grad, state, normalizer=n)
        moved = optax.apply_updates(U, updates)
        return (moved, state), (moved @ moved.T, value, n)

    return jax.jit(lambda U: jax.lax.scan(step, (U, optimizer.init(U)), length=steps))(U)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("subgm-"))
def test_golden(name):
    golden = load(name)
    m, (A, y, U0) = golden.meta, (jnp.asarray(golden.arrays[key]) for key in ("A", "y", "U0"))
    start = spectral_start(A, y, m["k"], m["alpha"])
    assert_close(start @ start.T, U0 @ U0.T, GOLDEN)
    grams, losses, norms = recover(A, y, U0, m["eta0"], m["rho"], m["steps"])
    np.testing.assert_allclose(grams, golden.arrays["gram"], atol=GOLDEN)
    np.testing.assert_allclose(losses, golden.arrays["loss"], rtol=GOLDEN)
    lengths = m["eta0"] * m["rho"] ** np.arange(m["steps"]) / norms
    np.testing.assert_allclose(lengths, golden.arrays["eta"], rtol=GOLDEN)


def sensing(outlier=0.0, d=8, r=2, m=300):
    keys = jax.random.split(jax.random.key(0), 4)
    factor = jax.random.normal(keys[0], (d, r))
    truth = factor @ factor.T / jnp.linalg.norm(factor @ factor.T)
    A = jax.random.normal(keys[1], (m, d, d))
    hit = jax.random.bernoulli(keys[2], 0.2, (m,))
    y = jnp.einsum("mij,ij->m", A, truth)
    return A, y + outlier * hit * jax.random.normal(keys[3], (m,)), truth


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 8])
def test_outliers_and_a_rank_that_is_too_large_do_no_harm(k):
    errors = []
    for outlier in (0.0, 10.0, 1e4):
        A, y, truth = sensing(outlier)
        start = spectral_start(A, y, k, 1e-2)
        grams, _, _ = recover(A, y, start, 0.25, 0.97, 300)
        errors.append(float(jnp.linalg.norm(grams[-1] - truth)))
    assert max(errors) < 5e-3
    np.testing.assert_allclose(errors[1], errors[2], rtol=0.3)


@pytest.mark.slow
def test_steps_that_end_before_the_growth_does_stall():
    """From a smaller start, the signal takes longer to grow than all steps together reach."""
    A, y, truth = sensing(10.0)
    start = spectral_start(A, y, 4, 1e-4)
    errors = [recover(A, y, start, 0.25, decay, 400)[0][-1] - truth for decay in (0.96, 0.985)]
    stalled, recovered = map(float, map(jnp.linalg.norm, errors))
    assert stalled > 0.1 > 0.01 > recovered


@pytest.mark.slow
def test_gram_matrix_does_not_depend_on_the_basis(x64):
    A, y, _ = sensing(10.0)
    A, y = A.astype(float), y.astype(float)
    start = spectral_start(A, y, 3, 1e-2)
    turn, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (3, 3), float))
    plain, turned = (recover(A, y, U, 0.25, 0.9, 20)[0] for U in (start, start @ turn))
    assert_close(turned, plain, 1e-9)


def test_equals_normalised_gradient_descent():
    schedule = optax.exponential_decay(0.3, 1, 0.9)
    theirs = optax.chain(optax.normalize_by_update_norm(), optax.sgd(schedule))
    ours = decaying_normalized_step(0.3, 0.9)
    a, b = ours.init(jnp.zeros(3)), theirs.init(jnp.zeros(3))
    for g in jax.random.normal(jax.random.key(2), (3, 3)):
        u, a = ours.update(g, a)
        v, b = theirs.update(g, b)
        assert_close(u, v, 1e-5)
    u, a = ours.update(jnp.zeros(3), a)
    np.testing.assert_array_equal(u, 0)
