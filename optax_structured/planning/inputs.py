"""What a plan starts from: shapes of a model, a mesh by name, the leaves that stay plain."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.memory import LLAMA_MODELS, PLAIN_LEAVES, llama
from optax_structured.trees import Axes, Rules, named_leaves, rules


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
    except ValueError as error:  # or not text
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f'{path} must hold {{"path": [shape], ...}}, one entry per parameter')
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
    """A `LowRank` for every leaf that can take it, but for those of the pattern `plain`.

    By default what is published so stays plain (embeddings, head, norms), if there is any. Kernels
    of attention with an axis of heads, told by names and shapes, are one matrix.
    """
    pairs: list[tuple[str, Any]] = []
    if plain is not None or any(re.search(PLAIN_LEAVES, name) for name, _ in named_leaves(params)):
        pairs.append((PLAIN_LEAVES if plain is None else plain, None))
    for name, axes in _with_heads(params).items():
        if not any(re.search(pattern, name) for pattern, _ in pairs):
            axes = dataclasses.replace(axes, side=spec.axes.side)
            pairs.append((f"^{re.escape(name)}$", dataclasses.replace(spec, axes=axes)))
    return rules(*pairs, default=spec)


_READ, _MADE = Axes(rows=(-2, -1), cols=-3), Axes(rows=-1, cols=(-3, -2))


def _with_heads(params: Any) -> dict[str, Axes]:
    """Attention kernels (in, heads, size) and (heads, size, out), with outputs for rows.

    Told from a stack of dense kernels of the same names by heads and size, which the kernels of one
    attention share.
    """
    shapes = {name: leaf.shape for name, leaf in named_leaves(params)}
    found: dict[str, Axes] = {}
    for name, shape in shapes.items():
        owner, _, part = name.removesuffix("/kernel").rpartition("/")
        out = f"{owner}/out/kernel".lstrip("/")
        made = shapes.get(out, ())
        if part not in ("query", "key", "value") or not name.endswith("/kernel"):
            continue
        if len(shape) == len(made) >= 3 and shape[-2:] == made[-3:-1]:
            found |= {name: _READ, out: _MADE}
    return found
