"""Matrix completion: exact recovery, by exact and by loose inner solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_structured.contrib.solvers import alternating_least_squares

KEY = jax.random.key(0)


def observed(share=0.5, shape=(60, 50), rank=3, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    rows, columns = np.nonzero(rng.random(shape) < share)
    return matrix, rows, columns, matrix[rows, columns]


def error(found, matrix):
    return np.abs(found.left @ found.right.T - matrix).max()


@pytest.mark.slow
def test_half_of_the_entries_are_enough(x64):
    matrix, *entries = observed()
    complete = functools.partial(alternating_least_squares, *entries, (60, 50), 3, key=KEY, ridge=0)
    errors = [error(complete(sweeps=sweeps), matrix) for sweeps in (10, 30)]
    assert errors[0] < 1e-2 and errors[1] < 1e-8
    losses = complete(sweeps=30).losses
    assert np.all(np.diff(losses) <= 1e-20)


def test_loose_solves_converge_linearly_to_the_same(x64):
    """Two steps of conjugate gradients a row, relative errors of some percent."""
    matrix, *entries = observed()
    complete = jax.jit(
        functools.partial(alternating_least_squares, shape=(60, 50), rank=3, key=KEY,
                          solver="pcg", inner_steps=2, sweeps=40)
    )  # fmt: skip
    found = complete(*entries)
    assert error(found, matrix) < 1e-6
    losses = found.losses[jnp.array([3, 8, 13])]
    assert losses[1] < 0.1 * losses[0] and losses[2] < 0.1 * losses[1]


def test_all_entries_are_a_truncated_svd_after_one_sweep(x64):
    matrix, *entries = observed(share=2.0, shape=(12, 9), rank=3)
    found = alternating_least_squares(*entries, (12, 9), 3, key=KEY, sweeps=1)
    assert error(found, matrix) < 1e-6
    np.testing.assert_allclose(found.right.T @ found.right, np.eye(3), atol=1e-12)


@pytest.mark.slow
def test_order_of_entries_and_rows_is_nothing(x64):
    matrix, rows, columns, values = observed(shape=(20, 15), rank=2, share=0.7)
    order = np.random.default_rng(1).permutation(len(rows))
    turned = np.random.default_rng(2).permutation(15)
    complete = functools.partial(alternating_least_squares, shape=(20, 15), rank=2, key=KEY)
    a = complete(rows, columns, values)
    b = complete(rows[order], turned[columns[order]], values[order])
    np.testing.assert_allclose(a.left @ a.right.T, (b.left @ b.right.T)[:, turned], atol=1e-6)


@pytest.mark.slow
def test_float32_and_rows_without_entries_are_finite():
    matrix, rows, columns, values = observed(shape=(20, 15), rank=2)
    keep = rows != 4
    for solver in ("cholesky", "pcg"):
        found = alternating_least_squares(
            rows[keep], columns[keep], values[keep].astype("float32"), (20, 15), 2, key=KEY,
            solver=solver,
        )  # fmt: skip
        assert found.left.dtype == jnp.float32
        assert jnp.all(jnp.isfinite(found.left)) and jnp.all(found.left[4] == 0)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="rank must be from 1 to 5, got 6"):
        alternating_least_squares([0], [0], [1.0], (5, 8), 6, key=KEY)
    with pytest.raises(ValueError, match="three vectors of one length"):
        alternating_least_squares([0, 1], [0], [1.0], (5, 8), 2, key=KEY)
    with pytest.raises(ValueError, match="solver must be 'cholesky' or 'pcg'"):
        alternating_least_squares([0], [0], [1.0], (5, 8), 2, key=KEY, solver="svd")
