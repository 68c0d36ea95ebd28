"""Trace and compile times of trees of many leaves: `python tests/benchmarks/many_leaves.py 500`.

Every leaf is 64 x 64, as in the unstacked layers and experts of a mixture. Seconds of CPU time, of
the whole step (`update` and `apply_updates` in one jit), optimizers in turn in one process; the
numbers of leaves and, after `--only`, names of optimizers choose less.
"""

import argparse
import statistics
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
    "contrib.galore": optax.contrib.galore(1e-3, rank=RANK),
    "adamw": optax.adamw(1e-3),
    "ramda, group lasso": oxs.ramda(1e-3, GROUPS, 1e-3),
    "galore": oxs.galore(1e-3, LOW_RANK),
    "fira": oxs.fira(1e-3, LOW_RANK),
    "apollo": oxs.apollo(1e-3, LOW_RANK),
    "adamw, 8 bits": oxs.quantized(optax.adamw(1e-3), min_size=0),
}


def seconds(optimizer, leaves):
    """To trace (with lowering), and to compile."""
    jax.clear_caches()
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(OPTIMIZERS))
    options = parser.parse_args()
    first, *_ = options.only
    for leaves in options.leaves:
        times = {name: [] for name in options.only}
        for _ in range(options.rounds):
            for name in options.only:
                times[name].append(seconds(OPTIMIZERS[name], leaves))
        print(f"{leaves} leaves: trace + compile, and their sum over that of {first}")
        for name, pairs in times.items():
            traced, compiled = map(statistics.median, zip(*pairs, strict=True))
            ratio = statistics.median(
                sum(mine) / sum(other) for mine, other in zip(pairs, times[first], strict=True)
            )
            print(f"{name:20}{traced:7.1f} +{compiled:6.1f}{ratio:7.2f}", flush=True)


if __name__ == "__main__":
    main()
