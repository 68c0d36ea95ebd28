"""A smaller program as two files that run without this library: StableHLO and arrays."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from optax_structured.compact.compact import Compacted
from optax_structured.trees import named_leaves

PROGRAM, PARAMS, REPORT = "program.stablehlo", "params", "report.txt"


def save(
    folder: pathlib.Path | str, compacted: Compacted, *inputs: Any, safetensors: bool = False
) -> None:
    """Writes a program, its parameters and its report to a folder.

    Args:
      folder: made if it is not there; files of an earlier call are replaced.
      compacted: from `compact`.
      *inputs: an example of the other arguments; the program takes inputs of these shapes only.
      safetensors: write `params.safetensors` instead of `params.npz`, which holds bfloat16 too;
        needs the package safetensors.

    Returns:
      None. `program.stablehlo` is read by `jax.export.deserialize`; its `call` takes the arrays of
      the other file in a list, in the order of their names (`params.npz` has them in that order),
      then the inputs. `report.txt` holds the report. JAX needs the package
      flatbuffers for it, which comes with the extra `export`.

    Raises:
      ValueError: parameters of a type that npz files do not hold.

    Example:
      >>> import pathlib, tempfile, jax, jax.numpy as jnp, numpy as np, optax_structured as oxs
      >>> params = {"a": jnp.eye(3).at[0].set(0)}
      >>> small = oxs.compact.compact(lambda p, x: x @ p["a"], params, jnp.ones((2, 3)))
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> oxs.compact.save(folder, small, jnp.ones((2, 3)))
      >>> program = jax.export.deserialize(bytearray((folder / "program.stablehlo").read_bytes()))
      >>> arrays = [*np.load(folder / "params.npz").values()]
      >>> print(program.call(arrays, jnp.ones((2, 3))))
      [[0. 1. 1.]
       [0. 1. 1.]]
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tree: Any = jax.tree.structure(compacted.params)
    named = named_leaves(compacted.params)
    order = sorted(range(len(named)), key=lambda i: named[i][0])
    arrays: dict[str, Any] = {named[i][0]: np.asarray(named[i][1]) for i in order}

    def run(leaves: list[Any], *inputs: Any) -> Any:
        placed = dict(zip(order, leaves, strict=True))
        return compacted.fn(tree.unflatten(placed[i] for i in range(len(order))), *inputs)

    _write(folder / PARAMS, arrays, safetensors)
    program = jax_export.export(jax.jit(run))([*arrays.values()], *inputs)
    (folder / PROGRAM).write_bytes(program.serialize())
    (folder / REPORT).write_text(f"{compacted.report}\n")


def _write(path: pathlib.Path, arrays: dict[str, Any], safetensors: bool) -> None:
    if safetensors:
        from safetensors.numpy import save_file

        save_file(arrays, path.with_suffix(".safetensors"))
        return
    for name, array in arrays.items():
        if array.dtype.kind == "V":
            raise ValueError(
                f"{name!r} is {array.dtype}, which npz files do not hold: save(..., "
                "safetensors=True)"
            )
    np.savez(path.with_suffix(".npz"), **arrays)
