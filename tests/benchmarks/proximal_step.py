"""One optimizer step on the tree of a 60M LLaMA: `python tests/benchmarks/proximal_step.py`.

All optimizers take turns in one process, parameters and state donated; what counts are medians of
the per-round ratios. Half of the groups have no weight and no gradient to speak of, so that they
die. `--compile` times trace and compilation instead, by the number of unrolled layers.
"""

import argparse
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import Run, Turns, compilation, is_shape

import optax_structured as oxs

GROUPS = oxs.GroupLasso(group_axis=-2)


def llama(width=512, hidden=1376, layers=8, vocabulary=32_000):
    """Shapes of the model; the defaults have 58,073,600 parameters in 75 leaves."""
    square, up, down = (width, width), (width, hidden), (hidden, width)
    layer = {"q": square, "k": square, "v": square, "o": square, "gate": up, "up": up, "down": down}
    layer |= {"norm1": (width,), "norm2": (width,)}
    shapes = {f"layer{i}": layer for i in range(layers)}
    return shapes | {"embed": (vocabulary, width), "head": (width, vocabulary), "norm": (width,)}


def unrolled_and_stacked(layers):
    """A narrower model in both layouts, for compilation."""
    unrolled = llama(256, 688, layers, 1000)
    one = unrolled["layer0"]
    stacked = {"layers": {k: (layers, *s) for k, s in one.items()}, "embed": unrolled["embed"]}
    return unrolled, stacked


def filled(shapes, seed, dying):
    """Normal entries; every second group is scaled by `dying`."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        x = 0.02 * rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            x[::2] *= dying
        return jnp.asarray(x)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


def optimizers():
    return {
        "contrib.madgrad": optax.contrib.madgrad(1e-2),
        "adamw": optax.adamw(1e-3),
        "ramda, strength 0": oxs.ramda(1e-2, GROUPS, 0.0),
        "ramda": oxs.ramda(1e-2, GROUPS, 1e-3),
        "prox_adam, strength 0": oxs.prox_adam(1e-3, GROUPS, 0.0),
        "prox_adam": oxs.prox_adam(1e-3, GROUPS, 1e-3),
    }


def kkt_residual(optimizer, params, grads):
    """Of the first ramda step, in float64: the largest over groups, relative to the linear term."""
    state = optimizer.init(params)
    point, state = jax.jit(optimizer.update)(grads, state, params)
    dual, metric = state.inner_state[0], state.inner_state[1].square_sum
    worst = 0.0
    for w, p, anchor, v, u in zip(
        *map(jax.tree.leaves, (point, params, dual.anchor, dual.gradient_sum, metric)), strict=True
    ):
        if w.ndim != 2:
            continue
        w, p, anchor, v, u = (np.asarray(x, np.float64) for x in (w, p, anchor, v, u))
        w = w + p
        metric = np.cbrt(u) + 1e-6
        threshold = float(dual.alpha) * 1e-3 * np.sqrt(w.shape[1])
        norm = np.linalg.norm(w, axis=1, keepdims=True)
        alive = norm > 0
        b = metric * anchor - v
        r = b - metric * w - threshold * w / np.where(alive, norm, 1.0)
        relative = np.linalg.norm(r, axis=1) / np.linalg.norm(b, axis=1)
        worst = max(worst, relative[alive[:, 0]].max(initial=0.0))
    return worst


def time_steps(rounds, layers):
    shapes = llama(layers=layers)
    params, grads = filled(shapes, 0, dying=0.0), filled(shapes, 1, dying=1e-3)
    size = sum(x.size for x in jax.tree.leaves(params))
    runs = {name: Run(optimizer, params, grads) for name, optimizer in optimizers().items()}
    turns = Turns(runs, rounds)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {size:,} parameters")
    print(f"{'':22}{'ms':>8}{'/madgrad':>10}{'(cpu)':>8}{'/adamw':>8}{'/own':>8}{'temp B/p':>10}")
    for name, run in runs.items():
        own = "prox_adam, strength 0" if name.startswith("prox_adam") else "ramda, strength 0"
        wall, cpu = turns.ratio(name, "contrib.madgrad")
        print(
            f"{name:22}{1e3 * turns.wall(name):8.1f}{wall:10.3f}{cpu:8.3f}"
            f"{turns.ratio(name, 'adamw')[0]:8.2f}{turns.ratio(name, own)[0]:8.2f}"
            f"{run.temporaries / size:10.2f}"
        )
    dead = [
        1 - GROUPS.support(w).mean()
        for w in jax.tree.leaves(runs["prox_adam"].params)
        if w.ndim == 2
    ]
    print(f"dead groups of prox_adam: {np.mean(dead):.2f}")
    without_average = oxs.ramda(1e-2, GROUPS, 1e-3, momentum=0.0)
    print(f"KKT residual of ramda: {kkt_residual(without_average, params, grads):.1e}")


def time_compilation(layers):
    unrolled, stacked = unrolled_and_stacked(layers)
    axes = oxs.presets.stacked(GROUPS)
    plain = r"norm"
    cases = {
        "ramda, unrolled": (unrolled, GROUPS),
        "ramda, stacked": (stacked, oxs.rules((plain, None), ("embed", GROUPS), default=axes)),
    }
    for name, (shapes, regularizer) in cases.items():
        wall, cpu = compilation(shapes, oxs.ramda(1e-2, regularizer, 1e-3))
        print(f"{layers} layers, {name}: {wall:.2f} s ({cpu:.2f} s of CPU)")
    wall, cpu = compilation(unrolled, optax.contrib.madgrad(1e-2))
    print(f"{layers} layers, contrib.madgrad: {wall:.2f} s ({cpu:.2f} s of CPU)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.compile:
        time_compilation(options.layers)
    else:
        time_steps(options.rounds, options.layers)
