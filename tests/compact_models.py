"""Inputs and networks that the tests of `compact` share, and zeros in their parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.trees import map_named

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
TOKENS = jnp.arange(10).reshape(2, 5)


def dead(params, *chosen):
    """Fresh numbers everywhere, and zeros in slices: (name, axis, indices)."""
    random = np.random.default_rng(0)

    def one(path, leaf):
        leaf = np.asarray(leaf, np.float32) + random.normal(size=leaf.shape).astype(np.float32) / 9
        leaf = np.abs(leaf) if "var" in path else leaf
        for name, axis, indices in chosen:
            if name in path:
                np.moveaxis(leaf, axis, 0)[list(indices)] = 0
        return jnp.asarray(leaf)

    return map_named(one, params)


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (1, 1), use_bias=False)(x)
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6)(x))
        return nn.Conv(2, (1, 1))(nn.avg_pool(x, (2, 2), (2, 2)))
