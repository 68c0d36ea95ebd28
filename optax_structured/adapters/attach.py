"""Merging at use: weights that become the adapted ones when a layer touches them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from optax_structured.adapters.tree import checked, constant_of, merged_leaf, warn_of_rounding
from optax_structured.trees import map_named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attached:
    """A frozen weight and its adapter, which stand for the adapted weight.

    Args:
      weight: comes first, since flax compares the shapes of leaves in order.
      node: of the adapter.
      constant: of the node.

    Example: see `attach`.
    """

    weight: Any
    node: Any
    constant: Any

    def __jax_array__(self) -> jax.Array:
        return merged_leaf(self.weight, self.node, self.constant)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        """Of the weight."""
        return self.weight.dtype

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.weight.ndim

    @property
    def size(self) -> int:
        """Of the weight."""
        return self.weight.size

    @property
    def T(self) -> jax.Array:  # noqa: N802  (as arrays have it)
        """The adapted weight, transposed."""
        return self.__jax_array__().T

    def __getitem__(self, index: Any) -> jax.Array:
        return self.__jax_array__()[index]

    def __matmul__(self, other: Any) -> jax.Array:
        return self.__jax_array__() @ other

    def __rmatmul__(self, other: Any) -> jax.Array:
        return other @ self.__jax_array__()

    def astype(self, dtype: Any) -> jax.Array:
        """The adapted weight in another dtype."""
        return self.__jax_array__().astype(dtype)

    def reshape(self, *shape: Any) -> jax.Array:
        """The adapted weight in another shape."""
        return self.__jax_array__().reshape(*shape)


def attach(
    params: Any, adapter: Mapping[str, Any], constants: Mapping[str, Any] | None = None
) -> Any:
    """Parameters that are merged where a layer uses them, one layer at a time.

    Under a scan over layers with remat no second copy of the weights exists, neither forward nor
    backward: the stack is sliced before it is merged.

    Args:
      params: the frozen parameters.
      adapter: from `init`.
      constants: as in `merge`; read off here if left out.

    Returns:
      `params` with an array-like for each adapted leaf. Works in flax (linen and nnx) and equinox
      layers and wherever a weight meets a function of `jax.numpy`; a function of `jax.lax` refuses
      it.

    Raises:
      ValueError: the adapter is that of another model.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.LoRA(rank=2))
      >>> attached = oxs.adapters.attach(params, adapter)
      >>> jnp.dot(jnp.ones(6), attached["kernel"])
      Array([6., 6., 6., 6.], dtype=float32)
    """
    nodes = checked("attach", params, adapter)
    warn_of_rounding("attach", params, nodes)

    def one(path: str, leaf: Any) -> Any:
        if path not in nodes:
            return leaf
        return Attached(leaf, nodes[path], constant_of(path, leaf, nodes[path], constants))

    return map_named(one, params)
