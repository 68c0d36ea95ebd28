"""How the benchmarks time: optimizers take turns, and medians of per-round ratios are what counts.

Every time is a pair, (wall, CPU) seconds.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax


def is_shape(node):
    return isinstance(node, tuple)


def stepper(optimizer):
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def timed(call):
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


class Run:
    """One optimizer at its own parameters; a call is a step and returns its time."""

    def __init__(self, optimizer, params, grads):
        self.params, self.grads = jax.tree.map(jnp.copy, params), grads
        self.state = jax.jit(optimizer.init)(self.params)
        self.step = stepper(optimizer).lower(self.params, self.state, grads).compile()
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self):
        return timed(self._step)

    def _step(self):
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params, self.state


class Turns:
    """The times of several runs, one step of each a round."""

    def __init__(self, runs, rounds):
        for run in runs.values():
            run(), run(), run()  # as many steps as a new subspace is fitted
        self.times = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                self.times[name].append(run())

    def wall(self, name):
        return statistics.median(wall for wall, _ in self.times[name])

    def ratio(self, name, base):
        """The median ratios of wall and of CPU time."""
        rounds = zip(self.times[name], self.times[base], strict=True)
        ratios = [(wall / of[0], cpu / of[1]) for (wall, cpu), of in rounds]
        return tuple(map(statistics.median, zip(*ratios, strict=True)))


def compilation(shapes, optimizer):
    """The time to trace and compile one step."""
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)
    state = jax.eval_shape(optimizer.init, params)

    def build():
        stepper(optimizer).lower(params, state, params).compile()

    return timed(build)
