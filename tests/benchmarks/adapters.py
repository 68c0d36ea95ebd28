"""Steps of fine-tuning a sentence encoder, in turn: `python tests/benchmarks/adapters.py`.

Weights are random, in the shapes of MiniLM-L6: 36 matrices of 384 x 384, 384 x 1536 and 1536 x 384.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from timing import Turns, timed

from optax_structured import adapters, rules
from optax_structured.training.finetune.encoder import LAYERS, Classifier

RANK = 8


def encoder(batch, length):
    model = Classifier(tuple(range(LAYERS)), heads=12, hidden=1536, classes=6)
    x = jax.random.normal(jax.random.key(0), (batch, length, 384))
    mask = jnp.ones((batch, length), bool)
    params = jax.jit(model.init)(jax.random.key(1), x, mask)["params"]

    def loss(params):
        logits = model.apply({"params": params}, x, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(batch) % 6).mean()

    return params, loss


class Step:
    """One way to train; a call is a step and returns its time."""

    def __init__(self, loss, trained, optimizer):
        self.trained, self.state = trained, optimizer.init(trained)

        def step(trained, state):
            updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
            return optax.apply_updates(trained, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(self.trained, self.state).compile()

    def __call__(self):
        return timed(self._step)

    def _step(self):
        self.trained, self.state = self.step(self.trained, self.state)
        return self.trained, self.state


def ways(batch, length):
    params, loss = encoder(batch, length)
    kernels = "layer_.*kernel"

    def made(spec):
        return adapters.init(jax.random.key(2), params, rules((kernels, spec), default=None))

    def merged(adapter):
        return loss(adapters.merge(params, adapter))

    def factored(adapter):
        with adapters.factored(adapter):
            return loss(params)

    adam, lora, full = optax.adam(1e-4), adapters.LoRA(RANK), adapters.Full()
    return {
        "full": Step(merged, made(full), adam),
        "LoRA, merged": Step(merged, made(lora), adam),
        "LoRA, factored": Step(factored, made(lora), adam),
        "LoRA-Pro, factored": Step(factored, made(lora), optax.chain(adapters.lora_pro(), adam)),
    }


def temporaries(depth=8, width=256, batch=16):
    """Bytes of merging at use under scan and remat, of the frozen input gradient, of a layer."""
    w = 0.05 * jax.random.normal(jax.random.key(0), (depth, width, width))
    params, x = {"layers": {"w": w}}, jnp.ones((batch, width))
    adapter = adapters.init(jax.random.key(1), params, adapters.LoRA(RANK))

    def apply(params, x):
        def body(x, layer):
            return jnp.tanh(jnp.dot(x, layer["w"])), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, params["layers"])[0])

    def of(f, *args):
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    attached = jax.grad(lambda ad, p, x: apply(adapters.attach(p, ad), x))
    return (
        of(attached, adapter, params, x),
        of(jax.grad(apply, argnums=1), params, x),
        2 * w.nbytes // depth,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    attached, frozen, layer = temporaries()
    print(
        f"temporaries of merging at use {attached:,} B, of the frozen input gradient {frozen:,} B"
    )
    print(f"(one merged layer and one gradient of it: {layer:,} B)")
    turns = Turns(ways(args.batch, args.length), args.rounds)
    for name in turns.times:
        line = f"{name:20} {1e3 * turns.wall(name):8.1f} ms"
        for base in ("full", "LoRA, factored"):
            line += f"   {turns.ratio(name, base)[0]:.2f} of {base}"
        print(line)


if __name__ == "__main__":
    main()
