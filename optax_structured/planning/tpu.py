"""What the TPU compiler makes of an optimizer's step, on any machine.

The compiler is that of PyPI's libtpu, the extra `tpu-compile`; nothing is executed.
"""

import importlib.util
import math
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from optax_structured.memory import abstract_state
from optax_structured.meshes import state_shardings
from optax_structured.planning.chips import Chip, topology
from optax_structured.planning.collectives import Traffic, traffic

MISSING = "the TPU compiler is not here: pip install 'optax-structured[tpu-compile]'"

# Of a machine without a TPU: so libtpu asks nobody where it runs.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class CompiledStep(NamedTuple):
    """A step of an optimizer, gradients given, compiled for the devices of a mesh."""

    trace_seconds: float
    compile_seconds: float
    code: int  # bytes
    arguments: int  # bytes on a device: weights, gradients, state
    temporaries: int  # bytes on a device
    traffic: Traffic
    text: str  # the program


def is_here() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(chip: Chip, count: int) -> list[Any]:
    """So many chips of a slice, to compile for.

    Raises:
      ModuleNotFoundError: without libtpu.
    """
    if not is_here():
        raise ModuleNotFoundError(MISSING)
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    found = topologies.get_topology_desc(topology(chip, count), platform="tpu").devices
    return list(found[:count])


def compile_step(
    tx: Any, placed: Any, mesh: Mapping[str, int], chip: Chip, kind: AxisType = AxisType.Auto
) -> CompiledStep:
    """Compiles `update` and `apply_updates` for a mesh of chips, weights and state donated.

    `placed` are the abstract parameters that `place` gives for the same mesh; an empty one is one
    device.
    """
    sizes = dict(mesh) or {"devices": 1}
    chosen = np.asarray(devices(chip, math.prod(sizes.values()))).reshape(*sizes.values())
    real = Mesh(chosen, tuple(sizes), axis_types=(kind,) * len(sizes))

    def on_chips(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(real, sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    params = jax.tree.map(lambda leaf: on_chips(leaf, leaf.sharding), placed)
    state = jax.tree.map(on_chips, abstract_state(tx, placed), state_shardings(tx, placed))

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    out = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    began = time.perf_counter()
    with jax.set_mesh(real):
        jitted = jax.jit(step, out_shardings=out, donate_argnums=(1, 2))
        lowered = jitted.lower(params, state, params)
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    text: Any = compiled.as_text()
    return CompiledStep(
        trace_seconds=traced - began,
        compile_seconds=time.perf_counter() - traced,
        code=memory.generated_code_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        traffic=traffic(text),
        text=text,
    )
