"""A whole train step of a small language model over that of adamw.

`python tests/benchmarks/train_step.py [rounds]`: forward, backward and optimizer in one jit,
parameters and state donated, all optimizers in turn; medians of the per-round ratios of wall and
CPU time (goals: 1.05, with a prox 1.10), and the temporaries of the whole step.
"""

import sys

import jax
import optax
from nonfinite_step import LOW_RANK, OPTIMIZERS, Step
from timing import Turns

import optax_structured as oxs
from optax_structured.training.lm.model import Functional
from optax_structured.training.names import PLAIN

GROUPS = oxs.rules((PLAIN, None), default=oxs.GroupLasso(-2))
STAGGERED = oxs.LowRank(64, period=50, refresh=oxs.Staggered())
STEPS = {
    "adamw": optax.adamw(1e-3),
    "galore": OPTIMIZERS["galore"],
    "galore, staggered": oxs.galore(1e-3, oxs.rules((PLAIN, None), default=STAGGERED)),
    "fira": OPTIMIZERS["fira"],
    "apollo": oxs.apollo(1e-3, LOW_RANK),
    "dct_adamw": oxs.dct_adamw(1e-3, LOW_RANK),
    "adamw, 8 bits": OPTIMIZERS["adamw, 8 bits"],
    "ramda, group lasso": OPTIMIZERS["ramda"],
    "prox_adam, group lasso": oxs.prox_adam(1e-3, GROUPS, 1e-4),
}


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    model = Functional(256, 4, 4, False)
    runs = {name: Step(model, optimizer) for name, optimizer in STEPS.items()}
    turns = Turns(runs, rounds)
    size = sum(x.size for x in jax.tree.leaves(runs["adamw"].params))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {size:,} parameters")
    print(f"{'':24}{'ms':>8}{'/adamw':>8}{'(cpu)':>8}{'temp MB':>9}")
    for name, run in runs.items():
        wall, cpu = turns.ratio(name, "adamw")
        milliseconds, megabytes = 1e3 * turns.wall(name), run.temporaries / 2**20
        print(f"{name:24}{milliseconds:8.1f}{wall:8.3f}{cpu:8.3f}{megabytes:9.1f}")


if __name__ == "__main__":
    main()
