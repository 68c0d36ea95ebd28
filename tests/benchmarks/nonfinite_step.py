"""What `skip_nonfinite` costs of a whole train step of a language model.

`python tests/benchmarks/nonfinite_step.py [rounds]` prints the ratios of the same step with and
without it (target 1.02), by wall and by CPU time, and the temporaries of both.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from timing import Turns, timed

import optax_structured as oxs
from optax_structured.training.lm.model import Functional
from optax_structured.training.names import PLAIN

BATCH, SEQUENCE = 8, 128
LOW_RANK = oxs.rules((PLAIN, None), default=oxs.LowRank(64, period=50))
OPTIMIZERS = {
    "adamw": oxs.skip_nonfinite(optax.adamw(1e-3)),
    "ramda": oxs.ramda(1e-3, oxs.rules((PLAIN, None), default=oxs.GroupLasso(-2)), 1e-4),
    "galore": oxs.galore(1e-3, LOW_RANK),
    "fira": oxs.fira(1e-3, LOW_RANK),
    "adamw, 8 bits": oxs.quantized(optax.adamw(1e-3)),
}


class Step:
    """A whole train step of one optimizer; a call runs it and returns its time."""

    def __init__(self, model, optimizer):
        def loss(params, inputs, targets):
            return jnp.mean(model.losses(params, inputs, targets))

        def step(params, state, tokens):
            gradient = jax.grad(loss)(params, tokens[:, :-1], tokens[:, 1:])
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.params = model.init(jax.random.key(0))
        self.state = jax.jit(optimizer.init)(self.params)
        self.tokens = jax.random.randint(jax.random.key(1), (BATCH, SEQUENCE + 1), 0, 256)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.tokens)
        self.step = lowered.compile()
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self):
        return timed(self._step)

    def _step(self):
        self.params, self.state = self.step(self.params, self.state, self.tokens)
        return self.params, self.state


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    model = Functional(256, 4, 4, False)
    print(f"{'':16}{'ms':>8}{'wall':>8}{'CPU':>8}{'MB without':>12}{'with':>8}")
    for name, optimizer in OPTIMIZERS.items():
        runs = {"without": Step(model, optimizer.inner), "with": Step(model, optimizer)}
        turns = Turns(runs, rounds)
        wall, cpu = turns.ratio("with", "without")
        megabytes = (run.temporaries / 2**20 for run in runs.values())
        print(
            f"{name:16}{1e3 * turns.wall('without'):8.1f}{wall:8.3f}{cpu:8.3f}"
            + "".join(f"{m:{width}.1f}" for m, width in zip(megabytes, (12, 8), strict=True)),
            flush=True,
        )


if __name__ == "__main__":
    main()
