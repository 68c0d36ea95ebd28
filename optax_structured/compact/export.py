"""A smaller program as two files that run without this library: StableHLO and arrays."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from optax_structured.compact.compact import Compacted
from optax_structured.trees import named_leaves

PROGRAM, PARAMS, REPORT = "program.stablehlo", "params.npz", "report.txt"


def save(folder: pathlib.Path | str, compacted: Compacted, *inputs: Any) -> None:
    """Writes a program, its parameters and its report to a folder.

    Args:
      folder: made if it is not there; files of an earlier call are replaced.
      compacted: from `compact`.
      *inputs: an example of the other arguments; the program takes inputs of these shapes only.

    Returns:
      None. `program.stablehlo` is read by `jax.export.deserialize`; its `call` takes the arrays of
      `params.npz` in a list in their order in the file, then the inputs. `report.txt` holds the
      report. JAX needs the package flatbuffers for it, which comes with the extra `export`.

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

    def run(leaves: list[Any], *inputs: Any) -> Any:
        return compacted.fn(jax.tree.unflatten(tree, leaves), *inputs)

    named = named_leaves(compacted.params)
    program = jax_export.export(jax.jit(run))([leaf for _, leaf in named], *inputs)
    (folder / PROGRAM).write_bytes(program.serialize())
    arrays: dict[str, Any] = {path: np.asarray(leaf) for path, leaf in named}
    np.savez(folder / PARAMS, **arrays)
    (folder / REPORT).write_text(f"{compacted.report}\n")
