"""The devices of a run: one, or a mesh of those of all its processes."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_structured.meshes import state_shardings
from optax_structured.planning import place

_SHARE_NO_PARAMETERS, _SHARE_NO_EXAMPLES = "data", "tensor"


def join() -> None:
    """Meets the other processes of a run, before anything asks JAX for devices.

    On a pod slice, under Slurm, Open MPI or Kubernetes JAX finds them by itself. Elsewhere each
    process is told by `JAX_COORDINATOR_ADDRESS` (host:port of the first), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`.

    Raises:
      ValueError: JAX does not find them.
    """
    count, number = (os.environ.get(f"JAX_{x}") for x in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(number) if number else None,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed: {error} Where JAX does not find the processes by itself, give each "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def in_any_process(*flags: bool) -> list[bool]:
    """Which of the flags are true in some process: what all of them then do."""
    if jax.process_count() == 1:
        return list(flags)
    return list(map(bool, multihost_utils.process_allgather(np.array(flags)).any(0)))


class Devices:
    """Where the arrays of a run live.

    Along a mesh axis called `data` only examples are split, along one called `tensor` only
    parameters, along any other, such as `fsdp`, both.

    Args:
      mesh: sizes by name, whose product is the number of devices of all processes; empty for one
        device.

    Raises:
      ValueError: another number of devices.
    """

    def __init__(self, mesh: Mapping[str, int] | None = None) -> None:
        sizes = dict(mesh or {})
        count = math.prod(sizes.values())
        if sizes and count != jax.device_count():
            raise ValueError(
                f"--mesh {','.join(f'{name}={size}' for name, size in sizes.items())} has "
                f"{count} devices, and this run has {jax.device_count()} in "
                f"{jax.process_count()} processes"
            )
        kinds = (AxisType.Auto,) * len(sizes)
        self.mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds) if sizes else None
        self._of_examples = tuple(name for name in sizes if name != _SHARE_NO_EXAMPLES)
        self._of_parameters = {x: n for x, n in sizes.items() if x != _SHARE_NO_PARAMETERS}
        self.share = math.prod(sizes[name] for name in self._of_examples)

    @property
    def everywhere(self) -> Any:
        """The sharding of what each device holds whole; None on one device."""
        return NamedSharding(self.mesh, P()) if self.mesh else None

    def shardings(self, optimizer: Any, params: Any) -> tuple[Any, Any]:
        """Those of abstract parameters, and of the state of their optimizer, on the mesh."""
        mesh: Any = self.mesh
        spread = place(params, self._of_parameters)

        def on_mesh(leaf: Any) -> Any:
            spec = leaf.sharding.spec if self._of_parameters else P()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        placed = jax.tree.map(on_mesh, spread)
        return jax.tree.map(lambda x: x.sharding, placed), state_shardings(optimizer, placed)

    def examples(self, shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> Any:
        """An array whose second axis is split: of each process only what its devices hold.

        Args:
          shape: of the whole.
          read: the part at a tuple of slices, one per axis.
        """
        if not self.mesh:
            return read((slice(None),) * len(shape))
        split = NamedSharding(self.mesh, P(None, self._of_examples or None))
        return jax.make_array_from_callback(shape, split, read)
