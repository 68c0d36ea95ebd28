"""Adam in two halves, decay after the step, and orthogonalised updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import assert_close, gradients, normal, params
from tolerances import reordered

from optax_structured.transforms import (
    bias_correction,
    decay_updated_weights,
    newton_schulz,
    orthogonalize,
    uncorrected_adam,
    uncorrected_rms,
)


def last_update(tx, dtype, steps=5):
    state, update = tx.init(params(dtype)), jax.jit(tx.update)
    for i in range(steps):
        updates, state = update(gradients(i, dtype), state, params(dtype))
    return updates, state


def test_the_two_halves_are_adam(x64):
    halves = optax.chain(uncorrected_adam(0.9, 0.99, eps=0.0), bias_correction(0.9, 0.99))
    got, _ = last_update(halves, jnp.float64)
    expected, _ = last_update(optax.scale_by_adam(0.9, 0.99, eps=0.0), jnp.float64)
    # 0/0 of entries without gradients is NaN there.
    assert_close(got, jax.tree.map(jnp.nan_to_num, expected), 1e-6)


def test_eps_stands_outside_the_uncorrected_root(x64):
    """As torch does it when the correction sits in the step size."""
    b1, b2, eps, g = 0.9, 0.999, 1e-2, np.array([0.1, -2.0])
    m = v = np.zeros(2)
    tx = optax.chain(uncorrected_adam(b1, b2, eps), bias_correction(b1, b2))
    state = tx.init(jnp.zeros(2))
    for t in range(1, 6):
        m, v = b1 * m + (1 - b1) * t * g, b2 * v + (1 - b2) * (t * g) ** 2
        expected = m / (np.sqrt(v) + eps) * np.sqrt(1 - b2**t) / (1 - b1**t)
        got, state = tx.update(jnp.asarray(t * g), state)
        np.testing.assert_allclose(got, expected, rtol=reordered(jnp.float64))


def test_correction_follows_schedules():
    """The mean of a constant gradient is exact after correction, whatever the decays."""
    b1, b2 = (lambda count: 0.9 / (count + 1)), (lambda count: 1 - 0.5 / (count + 1))
    tx = optax.chain(uncorrected_adam(b1, b2, 0.0), bias_correction(b1, b2))
    state = tx.init(jnp.zeros(2))
    for _ in range(5):
        got, state = tx.update(jnp.array([3.0, -2.0]), state)
        np.testing.assert_allclose(got, [1.0, -1.0], rtol=1e-6)


def test_moments_are_float32_and_updates_keep_their_dtype():
    updates, state = last_update(uncorrected_adam(), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.float32)}


def test_rms_with_momentum(x64):
    decay, eps, momentum, g = 0.9, 1e-3, 0.5, np.array([0.1, -2.0])
    tx = uncorrected_rms(decay, eps, momentum)
    state, v, n = tx.init(jnp.zeros(2)), np.zeros(2), np.zeros(2)
    for t in range(1, 5):
        v = decay * v + (1 - decay) * (t * g) ** 2
        n = momentum * n + t * g / (np.sqrt(v) + eps)
        got, state = tx.update(jnp.asarray(t * g), state)
        np.testing.assert_allclose(got, n, rtol=reordered(jnp.float64))
    assert len(jax.tree.leaves(uncorrected_rms().init(jnp.zeros(2)))) == 1


def test_rms_of_the_variance(x64):
    decay, eps, momentum, g = 0.9, 1e-3, 0.5, np.array([0.1, -2.0])
    tx = uncorrected_rms(decay, eps, momentum, centered=True)
    state, mean, v, n = tx.init(jnp.zeros(2)), np.zeros(2), np.zeros(2), np.zeros(2)
    for t in range(1, 5):
        mean = decay * mean + (1 - decay) * t * g
        v = decay * v + (1 - decay) * (t * g) ** 2
        n = momentum * n + t * g / (np.sqrt(v - mean**2) + eps)
        got, state = tx.update(jnp.asarray(t * g), state)
        np.testing.assert_allclose(got, n, rtol=reordered(jnp.float64))


def test_a_variance_below_zero_is_rounding_error():
    tx, ones = uncorrected_rms(0.5, 0.25, centered=True), jnp.ones(3)
    state = tx.init(ones)._replace(mu=ones, nu=(1 - 1e-5) * ones)
    updates, state = tx.update(ones, state)
    assert jnp.all(state.nu < jnp.square(state.mu))
    np.testing.assert_array_equal(updates, 4.0)


def test_decay_acts_on_the_updated_weights():
    weights, update = jnp.array([2.0, -1.0]), jnp.array([0.5, 0.25])
    tx = decay_updated_weights(lambda count: 0.1 * (count + 1), 0.5)
    state = tx.init(weights)
    for rate in (0.1, 0.2):
        got, state = tx.update(update, state, weights)
        expected = (weights + update) * (1 - rate * 0.5)
        np.testing.assert_allclose(weights + got, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="decay_updated_weights needs the current parameters"):
        tx.update(update, state)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 5, 4), (2, 3, 4, 4)])
def test_orthogonalised_singular_values(shape):
    tx = orthogonalize()
    x = normal("orthogonalize", shape)
    out, _ = tx.update(x, tx.init(x))
    values = np.linalg.svd(out, compute_uv=False)
    assert np.all((values > 0.6) & (values < 1.3))
    # The factors stay: the polar factor of the result is that of the input.
    polar = [u @ vt for u, _, vt in (np.linalg.svd(y, full_matrices=False) for y in (x, out))]
    np.testing.assert_allclose(*polar, atol=1e-4)


def test_stacks_and_transposes():
    x = normal("stack", (3, 5, 4))
    out = newton_schulz(x)
    one_by_one = jnp.stack([newton_schulz(m) for m in x])
    np.testing.assert_allclose(out, one_by_one, atol=1e-6)
    turned = newton_schulz(jnp.swapaxes(x, -1, -2))
    np.testing.assert_allclose(jnp.swapaxes(turned, -1, -2), out, atol=1e-6)
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((2, 3, 3))), 0.0)


def test_orthogonalize_in_half_precision():
    x = normal("dtype", (4, 6), jnp.bfloat16)
    fine, _ = orthogonalize().update(x, optax.EmptyState())
    rough, _ = orthogonalize(dtype=jnp.bfloat16).update(x, optax.EmptyState())
    assert fine.dtype == rough.dtype == jnp.float32  # updates: float32 at least
    np.testing.assert_allclose(fine.astype(float), rough.astype(float), atol=0.1)


def test_a_vector_cannot_be_orthogonalised():
    with pytest.raises(ValueError, match=r"leaf of shape \(3,\).*optax.partition"):
        orthogonalize().init({"bias": jnp.zeros(3)})
    with pytest.raises(ValueError, match="steps must be a whole number"):
        orthogonalize(steps=-1)
