"""What step sizes and curvature cost, interleaved, as ratios of CPU and wall time.

Run as ``python tests/benchmarks/curvature_cost.py [--rounds 20]``: diffgrad over adam, and the
density of a network of a million parameters at order 64, with its compile time.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax
from timing import Run, Turns

import optax_structured as oxs

SHAPES = {"a": (1024, 1024), "b": (1024, 512), "c": (512, 10)}


def friction(rounds):
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    grads = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
    optimizers = {
        "adam": optax.adam(1e-3),
        "adam, bad steps skipped": oxs.skip_nonfinite(optax.adam(1e-3)),
        "diffgrad": oxs.diffgrad(1e-3),
        "friction around adam": oxs.gradient_friction(optax.adam(1e-3)),
    }
    turns = Turns({name: Run(tx, grads, grads) for name, tx in optimizers.items()}, rounds)
    for name in optimizers:
        wall, cpu = turns.ratio(name, "adam")
        print(f"{name} over adam, one step: wall {wall:.2f}, CPU {cpu:.2f}")


def density():
    sizes = ((784, 1024), (1024, 200), (200, 10))
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, sizes, strict=False)]
    x = jax.random.normal(keys[3], (64, 784))

    def loss(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return jnp.mean(jax.nn.logsumexp(x @ params[-1], -1))

    run = jax.jit(lambda p: oxs.curvature.hessian_density(loss, p, x, keys[0], order=64, probes=1))
    start = time.perf_counter(), time.process_time()
    compiled = run.lower(params).compile()
    middle = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(params))
    end = time.perf_counter(), time.process_time()
    size = sum(w.size for w in params)
    print(
        f"density of {size:,} parameters, order 64: compile {middle[0] - start[0]:.1f} s wall "
        f"{middle[1] - start[1]:.1f} CPU, run {end[0] - middle[0]:.1f} wall "
        f"{end[1] - middle[1]:.1f} CPU"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    friction(parser.parse_args().rounds)
    density()


if __name__ == "__main__":
    main()
