"""Step sizes and curvature on small real problems, one experiment each; prints a table.

``python tests/benchmarks/step_sizes.py search|schedules|batches|stability|curvature [--seeds 3]``

search: PoNoS without tuning against SGD and Adam over rates, digits, MLP.
schedules: linear decay, cosine and the refined schedule, language model of bytes.
batches: a batch size that a noise test controls against fixed ones, at equal examples.
stability: SGD above and below the reported limit.
curvature: M-FAC and dual Gauss-Newton against Adam, badly scaled regression.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_structured as oxs
from optax_structured.training.images.data import load as load_images


@functools.cache
def digits():
    """Standardised images in rows, and labels; training and test."""
    found = load_images("digits", None)
    with jax.ensure_compile_time_eval():
        rows = [np.asarray(found.standardise(jnp.asarray(x))) for x in (found.train, found.test)]
    train, test = (x.reshape(len(x), -1) for x in rows)
    return train, np.asarray(found.train_labels), test, np.asarray(found.test_labels)


def mlp(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        {"w": jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, "b": jnp.zeros(o)}
        for k, i, o in shapes
    ]


def forward(params, x):
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def cross_entropy(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()


def train(optimizer, key, *, steps, batch=64, hidden=32):
    """Final loss and accuracy on digits, and how many losses each step evaluated."""
    x, y, test_x, test_y = map(jnp.asarray, digits())
    params = mlp(key, (x.shape[1], hidden, 10))
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, len(x))
        loss = lambda p: cross_entropy(p, x[rows], y[rows])  # noqa: E731
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        trials = optax.tree.get(state, "num_trials", jnp.zeros((), jnp.int32))
        return (optax.apply_updates(params, updates), state), trials

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    (params, state), trials = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    accuracy = jnp.mean(jnp.argmax(forward(params, test_x), -1) == test_y)
    return cross_entropy(params, x, y), accuracy, trials


def over_seeds(run, seeds):
    """The results of a run, seed by seed: a line search takes as long as its own trials."""
    jitted = jax.jit(run)
    jax.block_until_ready(jitted(jax.random.key(0)))
    start = time.process_time()  # CPU time: the machine has other users
    found = [jax.device_get(jitted(jax.random.key(seed))) for seed in range(seeds)]
    return [np.stack(x) for x in zip(*found, strict=True)], (time.process_time() - start) / seeds


def show(name, **columns):
    cells = (f"{k} {np.mean(v):.4g} ± {np.std(v):.1g}" for k, v in columns.items())
    print(f"{name:28}", "  ".join(cells), flush=True)


def search(seeds):
    runs = {"ponos": oxs.step_sizes.ponos()}
    runs |= {f"sgd {r:g}": optax.sgd(r) for r in (0.03, 0.1, 0.3, 1.0)}
    runs |= {f"adam {r:g}": optax.adam(r) for r in (1e-3, 3e-3, 1e-2, 3e-2)}
    for settings in ({}, {"hidden": 1000, "batch": 128}):  # the second as published, but for MNIST
        print(settings or "32 hidden units, batches of 64")
        for name, optimizer in runs.items():
            run = functools.partial(train, optimizer, steps=400, **settings)
            (loss, accuracy, trials), seconds = over_seeds(run, seeds)
            after, all_of_them = trials[:, 100:].mean(1), trials.sum(1)
            show(
                name,
                loss=loss,
                accuracy=accuracy,
                forwards=after,
                losses=all_of_them,
                cpu=[seconds],
            )
            if settings and name == "ponos":
                break  # only its cost: the sweep over rates is above


def schedules(seeds):
    from optax_structured.training.lm import text
    from optax_structured.training.lm.model import Functional

    steps, rate = 400, 1e-2
    model, data = Functional(32, 1, 2, False), text.load()
    train_text, held = jnp.asarray(data.train), jnp.asarray(data.held_out[: 64 * 33])

    def loss(params, windows):
        windows = windows.astype("int32")
        return model.losses(params, windows[:, :-1], windows[:, 1:]).mean()

    def run(schedule, key):
        adam = optax.adam(schedule)
        recorder = oxs.step_sizes.record_norms(1, capacity=steps // 4, every=4)
        optimizer = optax.chain(recorder, adam)
        params = model.init(key)

        def step(carry, key):
            params, state = carry
            at = jax.random.randint(key, (8,), 0, len(train_text) - 33)
            grad = jax.grad(loss)(params, train_text[at[:, None] + jnp.arange(33)])
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return loss(params, held.reshape(64, 33)), state[0].norms

    linear = optax.linear_schedule(rate, 0, steps)
    (found, norms), _ = over_seeds(functools.partial(run, linear), seeds)
    shape = oxs.step_sizes.refined_schedule(norms[0], "adam")
    print("refined shape, tenths:", shape[:: len(shape) // 10].round(2))
    show("linear decay", held_out=found)
    rest = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, steps),
        "refined, from one linear run": oxs.step_sizes.interpolated_schedule(shape, steps, rate),
    }
    for name, schedule in rest.items():
        show(name, held_out=over_seeds(functools.partial(run, schedule), seeds)[0][0])


def batches(seeds):
    """Microbatches of 16 through `accumulate`; the noise test sees their means."""
    examples, micro = 16384, 16
    x, y, _, _ = map(jnp.asarray, digits())
    control = oxs.step_sizes.BatchSizeController(micro, 512, interval=4)
    inner = optax.sgd(0.1)

    @functools.partial(jax.jit, static_argnames="every")
    def step(params, state, rows, every):
        optimizer = oxs.accumulate(inner, every)

        def one(carry, rows):
            params, state = carry
            grad = jax.grad(cross_entropy)(params, x[rows], y[rows])
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), grad

        (params, state), grads = jax.lax.scan(one, (params, state), rows)
        suggested = every * micro
        if every > 1:
            stats = oxs.step_sizes.microbatch_noise_stats(grads, micro)
            suggested = oxs.step_sizes.suggest_batch(stats, eta=0.5, maximum=512)
        return params, state, suggested

    for name, fixed in {"fixed 32": 32, "fixed 512": 512, "norm test, 32 to 512": None}.items():
        ends, counts = [], []
        for seed in range(seeds):
            key = jax.random.key(seed)
            params = mlp(key, (x.shape[1], 32, 10))
            state, batch, seen, steps = oxs.accumulate(inner, 1).init(params), fixed or 32, 0, 0
            while seen < examples:
                rows = jax.random.randint(jax.random.fold_in(key, steps + 1), (batch,), 0, len(x))
                every = control.every(batch)
                params, state, asked = step(params, state, rows.reshape(-1, micro), every)
                seen, steps = seen + batch, steps + 1
                if fixed is None and control.due(steps, batch):
                    batch = control.grow(batch, int(asked))
            ends.append(float(cross_entropy(params, x, y)))
            counts.append(steps)
        show(name, loss=ends, steps=counts)


def stability(seeds):
    """Least squares of a wide tanh network on 32 digits, from a point that fits them."""
    x, y, _, _ = map(jnp.asarray, digits())
    x, y = x[:32], (y[:32] % 2) * 2.0 - 1
    outputs = lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]  # noqa: E731
    loss = lambda p, x, y: jnp.mean((outputs(p, x) - y) ** 2) / 2  # noqa: E731

    def fitted(key):
        a, b = jax.random.split(key)
        p = {"u": jax.random.normal(a, (64, 64)) / 8, "v": jax.random.normal(b, (64,)) / 8}
        adam = optax.adam(3e-3)

        def step(carry, _):
            p, s = carry
            u, s = adam.update(jax.grad(loss)(p, x, y), s, p)
            return (optax.apply_updates(p, u), s), None

        return jax.lax.scan(step, (p, adam.init(p)), length=1500)[0][0]

    @jax.jit
    def run(key, factor):
        p = fitted(key)
        report = oxs.curvature.stability_report(
            outputs, p, x, learning_rate=1.0, batch_size=4, residuals=outputs(p, x) - y
        )
        noisy = jax.tree.map(lambda w: w + 1e-4 * jax.random.normal(key, w.shape), p)

        def step(p, key):
            rows = jax.random.randint(key, (4,), 0, 32)
            grads = jax.grad(loss)(p, x[rows], y[rows])
            return jax.tree.map(lambda w, g: w - factor * report.limit * g, p, grads), None

        last, _ = jax.lax.scan(step, noisy, jax.random.split(jax.random.fold_in(key, 1), 300))
        return report.limit, 2 / report.lambda_max, loss(noisy, x, y), loss(last, x, y)

    for factor in (0.25, 0.5, 0.9, 1.1, 1.5, 2.0):
        found = [jax.device_get(run(jax.random.key(s), factor)) for s in range(seeds)]
        limit, gd, before, after = (np.array(c) for c in zip(*found, strict=True))
        show(f"{factor} × limit", limit=limit, gd_limit=gd, before=before, after=after)


def curvature(seeds):
    """A network with inputs of very different scales; full batches, 200 steps."""
    steps = 200

    def run(make, key):
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (48, 8)) * jnp.logspace(-2, 0.5, 8)
        target = jnp.sin(x @ (jax.random.normal(keys[1], (8,)) / jnp.logspace(-2, 0.5, 8) / 3))
        sizes = jax.random.normal(keys[2], (8, 32)), jax.random.normal(keys[3], (32,)) / 6
        params = {"u": sizes[0], "v": sizes[1]}
        residual = lambda p: jnp.tanh(x @ p["u"]) @ p["v"] - target  # noqa: E731
        loss = lambda p: oxs.curvature.mean_square(residual(p))  # noqa: E731
        optimizer = optax.with_extra_args_support(make)

        def step(carry, _):
            p, s = carry
            u, s = optimizer.update(jax.grad(loss)(p), s, p, residual_fn=residual)
            return (optax.apply_updates(p, u), s), None

        (p, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return (loss(p),)

    dual = lambda rate, eps: optax.chain(  # noqa: E731
        oxs.curvature.scale_by_dual_gauss_newton(eps), optax.scale_by_learning_rate(rate)
    )
    runs = {f"adam {r:g}": optax.adam(r) for r in (3e-3, 1e-2, 3e-2)}
    runs |= {
        f"mfac {r:g}, damping {d:g}": oxs.curvature.mfac(r, 32, d, momentum=0.9)
        for r in (1e-3, 1e-2)
        for d in (1e-5, 1e-3)
    }
    runs |= {f"dual GN {r:g}": dual(r, 1e-4) for r in (0.1, 0.5)}
    for name, optimizer in runs.items():
        (loss,), seconds = over_seeds(functools.partial(run, optimizer), seeds)
        show(name, loss=loss, cpu=[seconds])


EXPERIMENTS = (search, schedules, batches, stability, curvature)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=[f.__name__ for f in EXPERIMENTS])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    globals()[given.experiment](given.seeds)


if __name__ == "__main__":
    main()
