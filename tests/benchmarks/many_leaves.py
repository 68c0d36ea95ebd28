"""Trace and compile times of trees of many leaves: `python tests/benchmarks/many_leaves.py 500`.

Every leaf is 64 x 64, as in the unstacked layers and experts of a mixture. Seconds of CPU time, of
the whole step (`update` and `apply_updates` in one jit), optimizers in turn in one process; the
numbers of leaves and, after `--only`, names of optimizers choose less.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax
from timing import stepper

import optax_structured as oxs

SIDE, RANK = 64, 16
LOW_RANK = oxs.LowRank(RANK)
GROUPS = oxs.GroupLasso(group_axis=-2)
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "contrib.galore": optax.contrib.galore(1e-3, rank=RANK),
    "ramda, group lasso": oxs.ramda(1e-3, GROUPS, 1e-3),
    "galore": oxs.galore(1e-3, LOW_RANK),
    "fira": oxs.fira(1e-3, LOW_RANK),
    "apollo": oxs.apollo(1e-3, LOW_RANK),
    "adamw, 8 bits": oxs.quantized(optax.adamw(1e-3), min_size=0),
}


def seconds(optimizer, leaves):
    """To trace (with lowering), and to compile."""
    params = {f"leaf{i:04}": jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32) for i in range(leaves)}
    start = time.process_time()
    state = jax.eval_shape(optimizer.init, params)
    lowered = stepper(optimizer).lower(params, state, params)
    traced = time.process_time()
    lowered.compile()
    return traced - start, time.process_time() - traced


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("leaves", type=int, nargs="*", default=[500])
    parser.add_argument("--only", nargs="+", default=list(OPTIMIZERS))
    options = parser.parse_args()
    seconds(optax.sgd(0.1), 1)  # what JAX does once
    print(f"{'':20}" + "".join(f"{n:>8} leaves" for n in options.leaves))
    for name in options.only:
        print(f"{name:20}", end="", flush=True)
        for leaves in options.leaves:
            traced, compiled = seconds(OPTIMIZERS[name], leaves)
            print(f"{traced:7.1f} +{compiled:6.1f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
