"""The adapter as a branch beside the layers of a flax.linen model: no weight is ever merged."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.adapters.lora import is_pair


@contextlib.contextmanager
def factored(
    adapter: Mapping[str, Any], constants: Mapping[str, Any] | None = None
) -> Iterator[None]:
    r"""Adds :math:`s (x a^\top) b^\top` to what the Dense layers of a linen model return.

    Two thin products per layer instead of a merged weight: fewer operations than full fine-tuning,
    and no rounding in half precision, since the branch adds up in float32.

    Args:
      adapter: `LoRA` of kernels of `nn.Dense`, by their paths in the parameters.
      constants: from `constants`, where `start="svd"`.

    Returns:
      A context, inside which `model.apply` is called with the frozen parameters.

    Raises:
      ValueError: an adapter that is not of a Dense kernel, or of a layer that did not run (inside
        `nn.scan` all layers share one path: use `attach`).

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(4), jnp.ones((1, 6))
      >>> params = model.init(jax.random.key(0), x)
      >>> adapter = oxs.adapters.init(jax.random.key(1), params, oxs.adapters.LoRA(rank=2))
      >>> with oxs.adapters.factored(adapter):
      ...     y = model.apply(params, x)
      >>> bool(jnp.array_equal(y, model.apply(params, x)))  # b = 0 at the start
      True
    """
    from flax import linen

    for path, node in adapter.items():
        if not (is_pair(node) and path.split("/")[-1] == "kernel" and node.b.ndim == 2):
            raise ValueError(
                f"adapters.factored takes LoRA of single Dense kernels, and {path!r} has "
                f"{type(node).__name__}; use merge or attach for it"
            )
    layers = {_module(path): path for path in adapter}
    used = set()

    def add_branch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        path = layers.get("/".join(context.module.path))
        if path is None or context.method_name != "__call__":
            return out
        if not isinstance(context.module, linen.Dense):
            raise ValueError(
                f"adapters.factored: {path!r} belongs to {type(context.module).__name__}, and only "
                "Dense layers can have a branch; use merge or attach for it"
            )
        used.add(path)
        x, node = args[0], adapter[path]
        added = _branch(x, node.a, node.b)
        if node.start:
            if constants is None or path not in constants:
                raise ValueError(
                    f"adapters.factored: {path!r} started from an SVD; give "
                    "constants=adapters.constants(params, adapter)"
                )
            added -= _branch(x, constants[path].a, constants[path].b)
        return (out + node.scale * added).astype(out.dtype)

    with linen.intercept_methods(add_branch):
        yield
    if missing := sorted(adapter.keys() - used):
        raise ValueError(
            f"adapters.factored: no Dense layer of {missing[0]!r} has run; the model was not "
            "applied inside the context, or the layer lies inside nn.scan: use attach there"
        )


def _module(path: str) -> str:
    """The path of the layer of a kernel, below the collection of the parameters."""
    *layer, _ = path.split("/")
    return "/".join(layer[1:] if layer[:1] == ["params"] else layer)


def _branch(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Both products in the precision of the input, added up in float32."""
    low = jnp.matmul(x, a.T.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.matmul(low.astype(x.dtype), b.T.astype(x.dtype), preferred_element_type=jnp.float32)
