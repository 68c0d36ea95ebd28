"""A weight that is trained whole, such as that of a new head."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.adapters.nodes import Adapter, Node
from optax_structured.trees.precision import at_least_float32, wide_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta(Node):
    """What is added to one weight.

    Args:
      x: shaped like the weight.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> oxs.adapters.Delta(jnp.ones(2)).merged(jnp.zeros(2), None)
      Array([1., 1.], dtype=float32)
    """

    x: Any

    @property
    def made_for(self) -> tuple[int, ...]:
        return self.x.shape

    def merged(self, weight: jax.Array, constant: None) -> jax.Array:
        return at_least_float32(weight) + self.x


@dataclasses.dataclass(frozen=True)
class Full(Adapter):
    """Trains all entries of a weight, from where it is: for heads, biases and norm scales.

    Weight decay pulls towards the pretrained weight, since what is trained is the difference.

    Raises:
      ValueError: on a weight without entries.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"head": jnp.ones((2, 2), jnp.bfloat16)}
      >>> oxs.adapters.init(jax.random.key(0), params, oxs.adapters.Full())["head"].x.dtype
      dtype('float32')
    """

    def check(self, shape: Sequence[int]) -> None:
        if math.prod(shape) == 0:
            raise ValueError(f"a weight of shape {tuple(shape)} has no entries to adapt")

    def init(self, key: jax.Array, weight: Any) -> Delta:
        return Delta(jnp.zeros_like(weight, wide_dtype(weight)))
