"""What a step needs beside its inputs: one decoded leaf, not the decoded state."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_structured as oxs

LARGEST, LEAVES = 256 * 256, 6
CODECS = {"8": oxs.Dynamic(), "4": oxs.Dynamic(4, block=128)}


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("make, moments", [(optax.adam, 2), (optax.adamw, 2), (optax.lion, 2)])
def test_temporaries_stay_below_the_largest_decoded_leaf(make, moments, codec):
    """Its moments in float32, and a tenth more; Lion reads its moment twice."""
    tx = oxs.quantized(make(1e-3), codec)
    params = {f"layer{i}": jax.ShapeDtypeStruct((256, 256), jnp.float32) for i in range(LEAVES)}
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    assert step.memory_analysis().temp_size_in_bytes <= 1.1 * 4 * LARGEST * moments
