"""One low-rank step on the tree of a 60M LLaMA: `python tests/benchmarks/low_rank_step.py`.

All optimizers take turns in one process, parameters and state donated; what counts are medians of
the per-round ratios. Steady steps and steps that refit are timed apart. `--compile` times trace and
compilation instead, by the number of layers.
"""

import argparse
import os
import statistics

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import optax
from proximal_step import filled, llama, unrolled_and_stacked
from timing import Run, Turns, compilation

import optax_structured as oxs

RANK = 128
NEVER = 10**6  # a period that no benchmark reaches
PLAIN = "embed|head|norm"
EVERY = 56  # steps between refits of a staggered leaf: one leaf of the 60M tree at each step


def low_rank(**parts):
    parts = {"period": NEVER, **parts}
    return oxs.rules((PLAIN, None), default=oxs.LowRank(RANK, **parts))


def contrib(period=NEVER):
    """Optax's own, with the same leaves projected; on the opposite side, which it cannot choose."""

    def numbers(params):
        spec = optax.contrib.GaLoreDimensionNumbers((0,), (1,))
        table = oxs.rules((PLAIN, None), default="projected")
        return jax.tree.map(lambda _, s: spec if s else None, params, table.tree(params))

    return optax.contrib.galore(
        1e-2, rank=RANK, update_proj_gap=period, scale=0.25, weight_dimension_numbers=numbers
    )


def optimizers():
    staggered = {"period": EVERY, "refresh": oxs.Staggered()}
    return {
        "contrib.galore": contrib(),
        "adamw": optax.adamw(1e-3),
        "galore": oxs.galore(1e-2, low_rank()),
        "galore, larger side": oxs.galore(1e-2, low_rank(axes=oxs.Axes(side="large"))),
        "galore, bfloat16 operands": oxs.galore(1e-2, low_rank(dtype="bfloat16")),
        "fira": oxs.fira(1e-2, low_rank()),
        "apollo": oxs.apollo(1e-2, low_rank()),
        "galore, refit": oxs.galore(1e-2, low_rank(period=1)),
        "galore, staggered": oxs.galore(1e-2, low_rank(**staggered)),
    }


def time_steps(rounds, layers, chosen):
    shapes = llama(layers=layers)
    params, grads = filled(shapes, 0, dying=1.0), filled(shapes, 1, dying=1.0)
    size = sum(x.size for x in jax.tree.leaves(params))
    table = {name: tx for name, tx in optimizers().items() if not chosen or name in chosen}
    runs = {name: Run(optimizer, params, grads) for name, optimizer in table.items()}
    turns = Turns(runs, rounds)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {size:,} parameters")
    bases = [name for name in ("contrib.galore", "galore", "adamw") if name in runs]
    print(f"{'':26}{'ms':>8}" + "".join(f"{'/' + b:>16}" for b in bases) + f"{'temp B/p':>10}")
    for name, run in runs.items():
        pairs = (turns.ratio(name, base) for base in bases)
        ratios = "".join(f"{wall:10.3f} ({cpu:.2f})" for wall, cpu in pairs)
        wall = 1e3 * turns.wall(name)
        print(f"{name:26}{wall:8.1f}{ratios}{run.temporaries / size:10.2f}")
    if "galore, staggered" in runs:
        run = runs["galore, staggered"]
        walls = [[run()[0] for _ in range(EVERY)] for _ in range(3)]
        per_step = [statistics.median(step) for step in zip(*walls, strict=True)]
        worst = max(per_step) / statistics.median(per_step)
        print(f"staggered over {EVERY} steps: largest / median step {worst:.2f}")


def time_compilation(layers):
    unrolled, stacked = unrolled_and_stacked(layers)
    spec = oxs.LowRank(64, period=200)
    cases = {
        "contrib.galore, unrolled": (unrolled, contrib(200)),
        "galore, unrolled": (unrolled, oxs.galore(1e-2, oxs.rules((PLAIN, None), default=spec))),
        "galore, stacked": (
            stacked,
            oxs.galore(1e-2, oxs.rules(("embed|norm", None), default=spec)),
        ),
        "fira, stacked": (stacked, oxs.fira(1e-2, oxs.rules(("embed|norm", None), default=spec))),
    }
    for name, (shapes, optimizer) in cases.items():
        wall, cpu = compilation(shapes, optimizer)
        print(f"{layers} layers, {name}: {wall:.2f} s ({cpu:.2f} s of CPU)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", help="names, separated by semicolons")
    options = parser.parse_args()
    if options.compile:
        time_compilation(options.layers)
    else:
        only = options.only.split(";") if options.only else []
        time_steps(options.rounds, options.layers, only)
