"""Quantiles by bisection are those of a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_structured.xla.quantile import quantile, ranked


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_they_are_those_of_numpy(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.abs(jax.random.normal(jax.random.key(0), (3, 50), dtype))
        x = x.at[0, :30].set(0.0).at[1].set(x[1, 0]).at[2, 0].set(1e-40)  # ties, and a subnormal
        for at in (0.0, 0.1, 0.59, 0.5937, 1.0):
            got = jax.jit(quantile)(x, jnp.full(3, at, dtype))
            want = [np.quantile(row, at) for row in np.asarray(x)]
            np.testing.assert_allclose(got, want, rtol=0, atol=16 * jnp.finfo(dtype).eps)
        place = jnp.array([0, 49, 17])
        want = np.take_along_axis(np.sort(np.asarray(x)), np.asarray(place)[:, None], -1)[:, 0]
        np.testing.assert_array_equal(ranked(x, place), want)
