"""What a plan starts from: shapes of a model, a mesh by name, the leaves that stay plain."""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.memory import LLAMA_MODELS, PLAIN_LEAVES, llama
from optax_structured.trees import Rules, named_leaves, rules


def named_model(name: str, dtype: Any, *, stacked: bool = False) -> Any:
    """Abstract parameters of a model by its name on the command line, such as `llama-7b`.

    Raises:
      ValueError: an unknown name.
    """
    family, _, size = name.lower().partition("-")
    if family != "llama" or size not in LLAMA_MODELS:
        known = ", ".join(f"llama-{size}" for size in LLAMA_MODELS)
        raise ValueError(f"no model {name!r}; there are {known}, or give --params-json")
    return llama(size, dtype, stacked=stacked)


def read_params(path: pathlib.Path, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract parameters from JSON: `{path: shape}` or `{path: {"shape": ..., "dtype": ...}}`.

    Raises:
      ValueError: not JSON, or an entry that is neither.
      OSError: the file cannot be read.
    """
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f'{path} must hold {{"path": [shape], ...}}, one entry a parameter')
    params = {}
    for name, entry in entries.items():
        try:
            given = entry if isinstance(entry, dict) else {"shape": entry}
            shape = tuple(int(n) for n in given["shape"])
            params[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(given.get("dtype", dtype)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}: {name!r} must be a shape such as [512, 512], or {{"shape": [512, 512], '
                f'"dtype": "bfloat16"}}, got {entry!r}'
            ) from error
    return params


def parse_mesh(text: str | None) -> dict[str, int]:
    """`fsdp=8,tensor=2` as sizes by name.

    >>> parse_mesh("fsdp=8,tensor=2")
    {'fsdp': 8, 'tensor': 2}
    """
    mesh = {}
    for part in text.split(",") if text else ():
        name, _, size = part.strip().partition("=")
        if not name.isidentifier() or not size.isdigit() or int(size) < 1 or name in mesh:
            raise ValueError(f"--mesh takes NAME=SIZE,..., such as fsdp=8, got {text!r}")
        mesh[name] = int(size)
    return mesh


def low_rank_rules(spec: Any, params: Any, plain: str | None = None) -> Rules:
    """`spec` for every leaf that can take it, but for those of a pattern.

    Args:
      spec: a `LowRank`.
      params: abstract parameters.
      plain: pattern of the leaves that stay plain; by default what is published so (embeddings,
        head, norms), if there is any.
    """
    if plain is None and not any(re.search(PLAIN_LEAVES, name) for name, _ in named_leaves(params)):
        return rules(default=spec)
    return rules((PLAIN_LEAVES if plain is None else plain, None), default=spec)
