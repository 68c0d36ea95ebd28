"""Smaller programs of trained networks: the same numbers, parameters, operations and times.

``python tests/benchmarks/compaction.py lm|images [--strength 1e-3 --steps 300 --batch 32]``

lm: language model of bytes with heads and MLP units under `couplings`, against no penalty.
images: the prox point of a run of `train` on images, test error before and after (RUN_FOLDER).
"""

import argparse
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_structured as oxs
from optax_structured import compact
from optax_structured.training.lm import text
from optax_structured.training.lm.model import Functional

WIDTH, LAYERS, HEADS, BATCH, LENGTH = 64, 2, 8, 16, 64


def windows(tokens, key, count):
    start = jax.random.randint(key, (count, 1), 0, len(tokens) - LENGTH - 1)
    found = tokens[start + jnp.arange(LENGTH + 1)]
    return found[:, :-1], found[:, 1:]


def train(model, params, optimizer, tokens, steps):
    def step(carry, key):
        params, state = carry
        batch = windows(tokens, key, BATCH)
        gradient = jax.grad(lambda p: model.losses(p, *batch).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])
    return run(params)


def language_model(strength, steps):
    model, source = Functional(WIDTH, LAYERS, HEADS), text.load()
    tokens, held_out = (jnp.asarray(x, jnp.int32) for x in (source.train, source.held_out))
    params = model.init(jax.random.key(0))
    inputs = windows(held_out, jax.random.key(2), 64)
    groups = compact.couplings(model.losses, params, *inputs, whole="embed")
    for name, optimizer in {
        "no penalty": oxs.prox_adam(3e-3),
        "couplings": oxs.prox_adam(3e-3, groups, strength),
    }.items():
        trained = train(model, params, optimizer, tokens, steps)
        small = compact.compact(model.losses, trained, *inputs, measure=True)
        before = math.exp(model.losses(trained, *inputs).mean())
        after = math.exp(small.fn(small.params, *inputs).mean())
        print(f"{name}: perplexity {before:.6f} -> {after:.6f}, blocked {small.report.blocked}")
        print(small.report, flush=True)


def images(folder, batch):
    from optax_structured.training import run
    from optax_structured.training.checkpoint import Checkpoints
    from optax_structured.training.tasks import find

    task = run.stored(find("images"), folder, {})
    with Checkpoints(folder) as saved:
        _, state = saved.restore(task.abstract_state())
    fn, params, inputs = task.network(state)
    size = batch or len(inputs[0])
    example = np.resize(task.images.test, (size, *task.images.test.shape[1:]))
    small = compact.compact(fn, params, example, measure=True)
    before, after = jax.jit(fn), jax.jit(small.fn)
    test = [task.images.test[i : i + size] for i in range(0, len(task.images.test), size)]
    same = sum(
        int((np.argmax(before(params, x), -1) == np.argmax(after(small.params, x), -1)).sum())
        for x in test
    )
    print(f"{same} of {len(task.images.test)} predictions are the same")
    print(small.report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["lm", "images"])
    parser.add_argument("folder", nargs="?", type=pathlib.Path)
    parser.add_argument("--strength", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, help="images of a call; default those of the run")
    given = parser.parse_args()
    if given.what == "lm":
        language_model(given.strength, given.steps)
    else:
        images(given.folder, given.batch)
