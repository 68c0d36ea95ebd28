"""What the TPU compiler makes of a step, without a TPU. Nothing is executed.

The compiler is that of libtpu, in the version that jax names: the extra `tpu-compile`. Of each
program: seconds of compilation, of which on the processor, megabytes of code, what a device holds,
and what it receives from others in a step without and with refits. A figure a command:

    python tests/benchmarks/tpu_compile.py qr orthonormal [--shape 4096x1024]
    python tests/benchmarks/tpu_compile.py fused fused_sharded --chip v6e
    python tests/benchmarks/tpu_compile.py galore [--steady] [--mesh fsdp=256] [--chip v5e]
"""

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

import optax_structured as oxs
from optax_structured import planning
from optax_structured.memory import PLAIN_LEAVES
from optax_structured.planning import tpu
from optax_structured.projectors.orthonormal import cholesky_qr, orthonormal
from optax_structured.proximal.fused import solve_blocks

jax.config.update("jax_platforms", "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", nargs="+", choices=sorted(FACTORISATIONS | STEPS))
    parser.add_argument("--chip", choices=planning.CHIPS, default="v5e")
    parser.add_argument("--mesh", default="fsdp=256", help="of the steps")
    parser.add_argument("--kind", choices=("auto", "explicit"), default="auto", help="of the mesh")
    parser.add_argument("--model", default="llama-7b", help="of the steps")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--shape", default="4096x1024", help="of the factorisations")
    parser.add_argument("--steady", action="store_true", help="a step that never refits")
    parser.add_argument("--hlo", type=pathlib.Path, help="write the compiled program here")
    options = parser.parse_args()
    if not tpu.is_here():
        sys.exit(f"no figure: {tpu.MISSING}")
    for name in options.figures:
        if name in FACTORISATIONS:
            print(name, factorisation(FACTORISATIONS[name], options), flush=True)
        else:
            print(name, step(STEPS[name], options), flush=True)


def factorisation(function, options):
    """A function of one matrix, whole on one device, or its rows spread over four."""
    shape = tuple(map(int, options.shape.split("x")))
    spec = jax.P("d") if function is fused_sharded else jax.P()
    devices = tpu.devices(planning.CHIPS[options.chip], 4 if function is fused_sharded else 1)
    place = NamedSharding(Mesh(np.asarray(devices), "d"), spec)
    matrix = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    with jax.set_mesh(place.mesh):
        lowered = jax.jit(function, out_shardings=place).lower(matrix)
    began, work = time.perf_counter(), time.process_time()
    code = lowered.compile().memory_analysis().generated_code_size_in_bytes
    seconds, work = time.perf_counter() - began, time.process_time() - work
    return f"{options.shape}: compile {seconds:.1f} s ({work:.1f} s of processor), {mb(code)} code"


def step(recipe, options):
    """A whole step of an optimizer on a model with stacked layers, spread over the mesh."""
    sizes = planning.parse_mesh(options.mesh)
    params = planning.named_model(options.model, jnp.float32, stacked=True)
    placed = planning.place(params, sizes)
    kind = AxisType.Auto if options.kind == "auto" else AxisType.Explicit
    tx = recipe(placed, options)
    work = time.process_time()
    found = tpu.compile_step(tx, placed, sizes, planning.CHIPS[options.chip], kind)
    work = time.process_time() - work
    if options.hlo:
        options.hlo.write_text(found.text)
    lines = [
        f"{options.chip}, {options.mesh}, {options.kind}{', steady' * options.steady}:",
        f"trace {found.trace_seconds:.1f} s, compile {found.compile_seconds:.1f} s "
        f"({work:.1f} s of processor), {mb(found.code)} code",
        f"a device: arguments {mb(found.arguments)}, temporaries {mb(found.temporaries)}",
        f"received in a step: {listed(found.traffic.always)}",
        f"received at most: {listed(found.traffic.at_most)}",
    ]
    return "\n  ".join(lines)


def mb(size):
    return f"{size / 1e6:,.1f} MB"


def listed(kinds):
    return ", ".join(f"{kind} {mb(size)}" for kind, size in sorted(kinds.items())) or "nothing"


def low_rank(recipe):
    def made(placed, options):
        steady = {"projector": SteadySubspace()} if options.steady else {}
        structure = planning.low_rank_rules(oxs.LowRank(options.rank, **steady), placed)
        return recipe(1e-3, oxs.choose_sides(structure, placed))

    return made


class SteadySubspace(oxs.SubspaceIteration):
    """Never fits: what is left is the step between two refits."""

    def refit(self, step):
        return step.basis, jnp.zeros_like(step.due)


def group_lasso(recipe):
    """A norm for each input of a kernel of each layer; embedding, head and norms have none."""

    def made(placed, options):
        del placed, options
        return recipe(
            1e-3, oxs.rules((PLAIN_LEAVES, None), default=oxs.GroupLasso(-2, batch_axis=0)), 1e-4
        )

    return made


def fused(x):
    """The kernel of `FusedExact`; groups are rows."""
    return solve_blocks(x, 1 + x**2, x, jnp.ones(()), inside=(1,))


def fused_sharded(x):
    return jax.shard_map(fused, in_specs=jax.P("d"), out_specs=jax.P("d"))(x)


FACTORISATIONS = {
    "fused": fused,
    "fused_sharded": fused_sharded,
    "qr": lambda x: jnp.linalg.qr(x)[0],
    "orthonormal": lambda x: orthonormal(x.T),
    "cholesky_qr": lambda x: cholesky_qr(x.T),
    "cholesky": lambda x: jnp.linalg.cholesky(x[: x.shape[1]]),
}
STEPS = {
    "adamw": lambda placed, options: optax.adamw(1e-3),
    "adamw-8bit": lambda placed, options: oxs.quantized(optax.adamw(1e-3)),
    "galore": low_rank(oxs.galore),
    "fira": low_rank(oxs.fira),
    "apollo": low_rank(oxs.apollo),
    "q_galore": low_rank(oxs.q_galore),
    "ramda": group_lasso(oxs.ramda),
    "prox_adam": group_lasso(oxs.prox_adam),
}

if __name__ == "__main__":
    main()
