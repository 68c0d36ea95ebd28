"""What a prox step needs beside its inputs: the arrays of one leaf, not of all of them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_structured as oxs

LEAVES, SHAPE = 6, (1024, 1024)  # too large for a loop
GROUPS = oxs.GroupLasso(group_axis=-2)


@pytest.mark.parametrize(
    "optimizer, arrays",
    [
        pytest.param(oxs.ramda(1e-2, GROUPS, 1e-3), 2, id="ramda"),
        pytest.param(oxs.prox_adam(1e-2, GROUPS, 1e-3), 2, id="prox_adam"),
        pytest.param(oxs.rmda(1e-2, GROUPS, 1e-3), 1, id="rmda"),
        pytest.param(oxs.prox_sgd(1e-2, GROUPS, 1e-3, momentum=0.9), 1, id="prox_sgd"),
        pytest.param(oxs.ramda(1e-2, oxs.L1(), 1e-3), 0, id="entrywise"),
        pytest.param(oxs.ramda(1e-2), 0, id="none"),
    ],
)
def test_temporaries_are_those_of_one_leaf(optimizer, arrays):
    """The linear term and, if it is not a number, the metric; and a few numbers a group."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {f"layer{i}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(LEAVES)}
    state = jax.eval_shape(optimizer.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    leaf = 4 * SHAPE[0] * SHAPE[1]
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.2 * arrays * leaf + 1024
