"""Waiting for another array changes nothing but the order of things."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structured as oxs
from optax_structured.transforms.nonfinite import unguarded
from optax_structured.xla.sequencing import zero_after

FLOATS = [0, 1, 200, -3.0, np.nan, np.inf, -np.inf]
BYTES = [0, 1, 255]


@pytest.mark.parametrize(
    "value, dtype",
    [(x, d) for d in ("float32", "bfloat16") for x in FLOATS] + [(x, "uint8") for x in BYTES],
)
def test_it_is_zero_whatever_comes_before(value, dtype):
    made = jnp.full((3, 2), value, dtype)
    for otherwise in (jnp.zeros(()), jnp.zeros((), jnp.uint8)):
        zero = jax.jit(zero_after)(made, otherwise)
        assert zero == 0 and zero.dtype == otherwise.dtype


def test_nothing_is_waited_for_where_there_is_nothing():
    zero = jnp.zeros(())
    assert zero_after(jnp.zeros((0, 4)), zero) is zero


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        oxs.ramda(1e-2, oxs.GroupLasso(-2), 1e-3),
        oxs.prox_adam(1e-2, oxs.GroupLasso(-2), 1e-3),
        oxs.quantized(optax.adam(1e-2), min_size=2),
    ],
    ids=["ramda", "prox_adam", "adam_8bit"],
)
def test_nan_in_a_leaf_does_not_reach_the_next(optimizer):
    """What the order of leaves does, without the rule that such a step is skipped as a whole."""
    optimizer = unguarded(optimizer)
    params = {"first": jnp.ones((16, 32)), "second": jnp.ones((16, 32))}
    step = jax.jit(optimizer.update)
    state = optimizer.init(params)
    sound, _ = step(params, state, params)
    spoilt, _ = step(params | {"first": jnp.full((16, 32), jnp.nan)}, state, params)
    np.testing.assert_array_equal(spoilt["second"], sound["second"])
