"""Adapters as safetensors files, with the names that the field uses."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_structured.adapters.codebooks import Codebook, Codes
from optax_structured.adapters.full import Delta
from optax_structured.adapters.lora import Pair
from optax_structured.adapters.nodes import Node
from optax_structured.adapters.snell import Kernel
from optax_structured.adapters.svfit import Spectrum
from optax_structured.adapters.tree import checked
from optax_structured.trees import Axes, named_leaves
from optax_structured.trees.precision import at_least_float32

_KINDS: dict[str, type[Node]] = {x.__name__: x for x in (Codes, Delta, Kernel, Pair, Spectrum)}
_ENTRY = "optax_structured"
_PEFT = "base_model.model."


def export(file: str | pathlib.Path, adapter: Mapping[str, Any]) -> None:
    """Writes an adapter into one safetensors file.

    The factors of LoRA are `base_model.model.<module>.lora_A.weight`, (r, inputs), and `lora_B`,
    (outputs, r), as in peft; alpha and rank are in the metadata of the file, with all that `load`
    needs. Needs the package `safetensors`.

    Args:
      file: path to write to.
      adapter: from `init`, trained or not.

    Returns:
      None.

    Example: see `load`.
    """
    from safetensors.numpy import save_file

    arrays, entries = {}, {}
    for path, node in adapter.items():
        for field in _array_fields(node):
            value = getattr(node, field)
            if value is not None:
                arrays[_key(path, node, field)] = np.ascontiguousarray(value)
        entry: dict[str, Any] = {"kind": type(node).__name__, "static": _static(node)}
        if isinstance(node, Pair):
            entry |= {"rank": node.rank, "alpha": node.scale * node.rank}
        entries[path] = entry
    save_file(arrays, file, metadata={"format": "np", _ENTRY: json.dumps(entries)})


def load(file: str | pathlib.Path, params: Any, *, alpha: float | None = None) -> dict[str, Any]:
    """Reads an adapter: a file of `export`, or LoRA factors as peft writes them.

    Args:
      file: path of a safetensors file.
      params: the parameters that it adapts, concrete or abstract. Of a peft file the module names
        are matched with their paths; kernels are (inputs, outputs), leaves called `weight`
        (outputs, inputs).
      alpha: for a peft file, unless an `adapter_config.json` beside it says it.

    Returns:
      The adapter.

    Raises:
      ValueError: the file is that of another model, or holds no adapter, or holds what is not read,
        such as whole modules or the magnitudes of DoRA, or no alpha is known.

    Example:
      >>> import pathlib, tempfile, jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.LoRA(rank=2))
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "adapter.safetensors"
      >>> oxs.adapters.export(file, adapter)
      >>> again = oxs.adapters.load(file, params)
      >>> bool(jnp.array_equal(again["mlp/kernel"].a, adapter["mlp/kernel"].a))
      True
    """
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata() or {}
        arrays = {name: jnp.asarray(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    if _ENTRY in metadata:
        adapter = {
            path: _restored(path, entry, arrays)
            for path, entry in json.loads(metadata[_ENTRY]).items()
        }
    else:
        adapter = _from_peft(pathlib.Path(file), arrays, params, alpha)
    return dict(checked("load", params, adapter))


def _array_fields(node: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]


def _static(node: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(node, **dict.fromkeys(_array_fields(node))))
    return {name: value for name, value in fields.items() if name not in _array_fields(node)}


def _key(path: str, node: Any, field: str) -> str:
    if type(node) is Pair or node is Pair:
        return f"{_PEFT}{_module(path)}.lora_{field.upper()}.weight"
    return f"{path}.{field}"


def _module(path: str) -> str:
    return path.rpartition("/")[0].replace("/", ".") or path


def _restored(path: str, entry: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    kind, static = _KINDS[entry["kind"]], dict(entry["static"])
    if "axes" in static:
        static["axes"] = _axes(static["axes"])
    if "sides" in static:
        static["sides"] = tuple(static["sides"])
    if "spec" in static:
        spec = dict(static["spec"])
        static["spec"] = Codebook(**{**spec, "axes": _axes(spec["axes"])})
    fields = [f.name for f in dataclasses.fields(kind) if not f.metadata.get("static")]  # type: ignore[arg-type]
    return kind(**{name: arrays.get(_key(path, kind, name)) for name in fields}, **static)


def _axes(stored: Mapping[str, Any]) -> Axes:
    rows, cols = (tuple(x) if isinstance(x, list) else x for x in (stored["rows"], stored["cols"]))
    return Axes(rows, cols, stored["side"])


def _from_peft(
    file: pathlib.Path, arrays: Mapping[str, Any], params: Any, alpha: float | None
) -> dict[str, Pair]:
    config_file, config = file.with_name("adapter_config.json"), {}
    if config_file.exists():
        config = json.loads(config_file.read_text())
        alpha = config["lora_alpha"] if alpha is None else alpha
    ends = ".lora_A.weight"
    modules = [name.removesuffix(ends) for name in arrays if name.endswith(ends)]
    if not modules:
        raise ValueError(f"adapters.load: {file} holds no lora_A, and was not made by export")
    if alpha is None:
        raise ValueError(
            f"adapters.load: {file} does not say its alpha; put its adapter_config.json beside it, "
            "or give alpha=..."
        )
    known = {f"{module}.lora_{x}.weight" for module in modules for x in "AB"}
    if other := sorted(arrays.keys() - known):
        raise ValueError(
            f"adapters.load: {file} holds {other[0]!r} beside factors of LoRA ({len(other)} such "
            "tensors, as of DoRA, biases or whole modules), which it does not read; take them out"
        )
    alphas = config.get("alpha_pattern") or {}
    adapter = {}
    for module in modules:
        own = (x for end, x in alphas.items() if re.fullmatch(rf"(.*\.)?({end})", module))
        path = _path_of(module.removeprefix(_PEFT), params)
        a, b = arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"]
        rank = a.shape[-2]
        scale = next(own, alpha) / (rank**0.5 if config.get("use_rslora") else rank)
        axes = Axes(-1, -2) if path.endswith("weight") else Axes()
        a, b = at_least_float32(a), at_least_float32(b)
        adapter[path] = Pair(a, b, scale, axes)
    return adapter


def _path_of(module: str, params: Any) -> str:
    """The weight of the parameters that a module of a peft file means."""

    def alike(path: str) -> bool:
        ours = _module(path)
        return ours == module or f".{ours}".endswith(f".{module}") or module.endswith(f".{ours}")

    found = [path for path, leaf in named_leaves(params) if np.ndim(leaf) >= 2 and alike(path)]
    if len(found) != 1:
        raise ValueError(
            f"adapters.load: the adapter is that of another model: {module!r} of the file matches "
            f"{', '.join(found) if found else 'no matrix'} of these parameters; rename its tensors"
        )
    return found[0]
