"""LeNet on Fashion-MNIST: rows of kernels against `couplings`, cut and refitted, beside dense.

``python tests/benchmarks/compaction_groups.py dense|rows|couplings [--strength 1e-4]``

Penalised epochs of `ramda`, then the smaller network is trained further without a penalty; the
dense network is trained for as many epochs in all. Prints errors on the test images after each
part, sizes, operations and forward times of 256 images.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_structured as oxs
from optax_structured import compact
from optax_structured.training.images import data, models

BATCH, TEST_BATCH = 128, 256


def epochs(fn, optimizer, params, images, labels, count, seed):
    """Parameters after some epochs, shuffled each."""
    steps = len(labels) // BATCH

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(lambda p: models.cross_entropy(fn(p, images[batch]), labels[batch]))
        updates, state = optimizer.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def epoch(carry, key):
        batches = jax.random.permutation(key, len(labels))[: steps * BATCH].reshape(steps, BATCH)
        return jax.lax.scan(step, carry, batches)[0]

    carry = params, optimizer.init(params)
    for i in range(count):
        start = time.perf_counter()
        carry = epoch(carry, jax.random.fold_in(jax.random.key(seed), i))
        jax.block_until_ready(carry)
        print(f"  epoch {time.perf_counter() - start:.1f} s", flush=True)
    return carry[0]


def predictions(fn, params, images):
    run = jax.jit(lambda p, x: jnp.argmax(fn(p, x), -1))
    parts = [images[i : i + TEST_BATCH] for i in range(0, len(images), TEST_BATCH)]
    return np.concatenate([run(params, x) for x in parts])


def main(groups, strength, penalised, refit, seed):
    found = data.load("fashion-mnist")
    model = models.make("lenet", found.train.shape[1:], 10)
    train, labels = jnp.asarray(found.train), jnp.asarray(found.train_labels)
    test, expected = jnp.asarray(found.test), found.test_labels

    def network(params, images):
        return model.apply({"params": params}, found.standardise(images))

    def error(fn, params):
        return f"{100 * np.mean(predictions(fn, params, test) != expected):.2f} % wrong"

    def plain(count):
        decay = optax.cosine_decay_schedule(1e-3, count * (len(labels) // BATCH))
        return optax.adamw(decay, weight_decay=0.0)

    params = models.init(model, train.shape[1:], jax.random.key(seed))
    example = test[:TEST_BATCH]
    if groups == "dense":
        count = penalised + refit
        params = epochs(network, plain(count), params, train, labels, count, seed)
        print(f"dense, {count} epochs: {error(network, params)}")
        return
    structure = oxs.rules(("bias", None), default=oxs.GroupLasso(-2))
    if groups == "couplings":
        structure = compact.couplings(network, params, example)
    total = penalised * (len(labels) // BATCH)
    momentum = 1 - (5 / (total // 2)) ** 0.5
    optimizer = oxs.ramda(
        1e-2, structure, strength, momentum=momentum, stages=oxs.Stages.equal(total, number=2)
    )
    params = epochs(network, optimizer, params, train, labels, penalised, seed)
    print(f"{groups}, strength {strength}, {penalised} epochs: {error(network, params)}")
    small = compact.compact(network, params, example, measure=True)
    same = (predictions(small.fn, small.params, test) == predictions(network, params, test)).sum()
    print(f"cut: {same} predictions of {len(test)} are the same, blocked {small.report.blocked}")
    print(small.report, flush=True)
    smaller = epochs(small.fn, plain(refit), small.params, train, labels, refit, seed + 1)
    print(f"refit, {refit} epochs: {error(small.fn, smaller)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", choices=["dense", "rows", "couplings"])
    parser.add_argument("--strength", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--refit", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.groups, given.strength, given.epochs, given.refit, given.seed)
