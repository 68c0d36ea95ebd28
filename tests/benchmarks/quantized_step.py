"""One step on stored state of a 60M LLaMA: `python tests/benchmarks/quantized_step.py`.

Each optimizer takes turns with itself in 8 and in 4 bits in one process, parameters and state
donated; what counts are medians of the per-round ratios to the one in 32 bits.
"""

import argparse
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import optax
from proximal_step import filled, llama
from timing import Run, Turns, compilation

import optax_structured as oxs

CODECS = {"8 bits": oxs.Dynamic(), "4 bits": oxs.Dynamic(4, block=128)}
PLAIN = {"adam": (optax.adam(1e-3), 2), "lion": (optax.lion(1e-4), 1)}  # and moments an entry


def optimizers(plain):
    stored = {f"{plain}, {bits}": codec for bits, codec in CODECS.items()}
    optimizer = PLAIN[plain][0]
    return {plain: optimizer} | {n: oxs.quantized(optimizer, c) for n, c in stored.items()}


def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def measure(plain, rounds, layers):
    shapes = llama(layers=layers)
    params, grads = filled(shapes, 0, dying=1.0), filled(shapes, 1, dying=1.0)
    entries = [x.size for x in jax.tree.leaves(params)]
    decoded = 4 * PLAIN[plain][1] * max(entries)
    table = optimizers(plain)
    runs = {name: Run(optimizer, params, grads) for name, optimizer in table.items()}
    turns = Turns(runs, rounds)
    for name, run in runs.items():
        wall, cpu = turns.ratio(name, plain)
        compiling, _ = compilation(shapes, table[name])
        print(
            f"{name:16}{1e3 * turns.wall(name):10.1f}{wall:10.3f} ({cpu:.2f})"
            f"{run.temporaries / decoded:12.2f}{bytes_of(run.state) / sum(entries):10.3f}"
            f"{compiling:12.2f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", choices=PLAIN)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.layers} layers")
    titles = ("ms", "wall (CPU) / 32 bits", "temp / leaf", "state B/p", "compile s")
    print(
        " " * 16 + "".join(f"{t:>{w}}" for t, w in zip(titles, (10, 20, 12, 12, 12), strict=True))
    )
    for plain in [options.only] if options.only else PLAIN:
        measure(plain, options.rounds, options.layers)
