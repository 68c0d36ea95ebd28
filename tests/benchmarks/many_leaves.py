"""Trace and compile times of trees of many leaves: `python tests/benchmarks/many_leaves.py 500`.

Every leaf is 64 x 64, as in the unstacked layers and experts of a mixture. Seconds of CPU time, of
the whole step (`update` and `apply_updates` in one jit), optimizers in turn in one process. Names
after `--only` choose some, and of several numbers of leaves the growth is shown, too: `500 2000`.
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
    times = {leaves: {name: [] for name in options.only} for leaves in options.leaves}
    for _ in range(options.rounds):
        for name in options.only:
            for leaves in options.leaves:
                times[leaves][name].append(seconds(OPTIMIZERS[name], leaves))
    for leaves, by_name in times.items():
        print(f"{leaves} leaves: trace + compile, and their sum over that of {first}")
        for name, pairs in by_name.items():
            traced, compiled = map(statistics.median, zip(*pairs, strict=True))
            print(f"{name:20}{traced:7.1f} +{compiled:6.1f}{ratio(pairs, by_name[first]):7.2f}")
    fewest, *more = times
    for leaves in more:
        print(f"growth from {fewest} to {leaves} leaves")
        for name, pairs in times[leaves].items():
            print(f"{name:20}{ratio(pairs, times[fewest][name]):7.2f}")


def ratio(pairs, others):
    """The median of the ratios of their sums, round by round."""
    return statistics.median(
        sum(mine) / sum(other) for mine, other in zip(pairs, others, strict=True)
    )


if __name__ == "__main__":
    main()
