"""The five LLaMA models of the low-rank literature, as shapes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

VOCABULARY = 32_000

# What is published as not projected: the pattern that picks it in `llama(...)`.
PLAIN_LEAVES = r"embed|head|norm"


@dataclasses.dataclass(frozen=True)
class LlamaSize:
    """The numbers that make one of the models."""

    hidden: int
    intermediate: int
    layers: int
    rank: int  # of the published low-rank runs


# The papers print 24 heads and 32 layers for 1B; its configuration has 24 layers.
LLAMA_MODELS = {
    "60m": LlamaSize(hidden=512, intermediate=1376, layers=8, rank=128),
    "130m": LlamaSize(hidden=768, intermediate=2048, layers=12, rank=256),
    "350m": LlamaSize(hidden=1024, intermediate=2736, layers=24, rank=256),
    "1b": LlamaSize(hidden=2048, intermediate=5461, layers=24, rank=512),
    "7b": LlamaSize(hidden=4096, intermediate=11008, layers=32, rank=1024),
}


def llama(name: str, dtype: Any = jnp.float32, *, stacked: bool = False) -> dict[str, Any]:
    """Abstract parameters of one of the five models: untied embedding and head, no biases.

    Args:
      name: "60m", "130m", "350m", "1b" or "7b", in any case.
      dtype: of every parameter.
      stacked: one leaf for all layers, with a leading axis, as a scan over layers holds them.

    Returns:
      Nested dictionaries of `jax.ShapeDtypeStruct`; kernels are (in, out). `PLAIN_LEAVES` matches
      the leaves that are published as not projected, and no other.

    Raises:
      ValueError: an unknown name.

    >>> params = llama("7B")
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    6738415616
    """
    if name.lower() not in LLAMA_MODELS:
        raise ValueError(f"llama: no model {name!r}; there are {', '.join(LLAMA_MODELS)}")
    size = LLAMA_MODELS[name.lower()]
    d, f = size.hidden, size.intermediate

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def layer(*stack: int) -> dict[str, Any]:
        def kernel(*shape: int) -> dict[str, Any]:
            return {"kernel": leaf(*stack, *shape)}

        return {
            "attention": {part: kernel(d, d) for part in ("query", "key", "value", "out")},
            "mlp": {"gate": kernel(d, f), "up": kernel(d, f), "down": kernel(f, d)},
            "attention_norm": {"scale": leaf(*stack, d)},
            "mlp_norm": {"scale": leaf(*stack, d)},
        }

    return {
        "embed": {"embedding": leaf(VOCABULARY, d)},
        "layers": layer(size.layers) if stacked else [layer() for _ in range(size.layers)],
        "norm": {"scale": leaf(d)},
        "head": {"kernel": leaf(d, VOCABULARY)},
    }
