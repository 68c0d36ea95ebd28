"""Adam in 8 bits on an embedding with rare tokens, 2000 steps; draws docs/images/rare_tokens.png.

Every row of an embedding is pulled to a target whenever its token occurs, which for token k has
probability 1 / (k + 1). Tokens are numbered at random, so that rare and frequent ones share blocks;
the second moment of a rare row is then near the first numbers of the code, or below. Rounded to 0
it makes the next step sqrt(1 / (1 - b2)) = 32 times too long, and while no gradient comes, the
first moment is divided by eps alone.

Run as ``python tests/benchmarks/rare_tokens.py [--seeds 3] [--out docs/images/rare_tokens.png]``.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import optax_structured as oxs
from optax_structured.training.style import COLOURS, STYLE, figure_of

TOKENS, WIDTH, STEPS, RATE = 1024, 64, 2000, 1e-2


def runs(codec, seed):
    """Distance to the targets and largest step in units of the rate, over the steps."""
    adam = optax.adam(RATE, b2=0.999)
    size = math.inf if codec is None else 4096
    optimizer = oxs.quantized(adam, codec or oxs.Dynamic(), min_size=size)
    keys = jax.random.split(jax.random.key(seed), 4)
    often = jax.random.permutation(keys[0], 1 / jnp.arange(1.0, TOKENS + 1))
    target = jax.random.normal(keys[1], (TOKENS, WIDTH))
    loudness = jnp.exp(2 * jax.random.normal(keys[2], (TOKENS, 1)))  # of a token's gradients

    def step(carry, key):
        rows, state = carry
        seen = jax.random.bernoulli(key, often)[:, None]
        gradient = {"rows": jnp.where(seen, loudness * (rows["rows"] - target), 0)}
        updates, state = optimizer.update(gradient, state, rows)
        rows = optax.apply_updates(rows, updates)
        distance = jnp.sqrt(jnp.mean((rows["rows"] - target) ** 2))
        return (rows, state), (distance, jnp.max(jnp.abs(updates["rows"])) / RATE)

    start = {"rows": jnp.zeros((TOKENS, WIDTH))}
    keys = jax.random.split(keys[3], STEPS)
    return jax.lax.scan(step, (start, optimizer.init(start)), keys)[1]


CODECS = {
    "float32": None,
    "8 bits, positive v never 0 (default)": oxs.Dynamic(),
    "8 bits, as published": oxs.Dynamic(published=True),
    "4 bits, positive v never 0": oxs.Dynamic(bits=4, block=128),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="docs/images/rare_tokens.png")
    given = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        draw(given.seeds, given.out)


def draw(seeds, path):
    figure = figure_of("Adam on an embedding with rare tokens", 11.0, 4.2)
    axes = figure.subplots(1, 2)
    lines = zip(CODECS.items(), COLOURS, (4.0, 2.2, 1.6, 1.2), strict=False)
    for (name, codec), colour, width in lines:
        curves = [jax.jit(runs, static_argnums=0)(codec, s) for s in range(seeds)]
        distance, step = (np.asarray([c[i] for c in curves]) for i in (0, 1))
        print(
            f"{name:40} distance at the end {distance[:, -1].mean():.4f}, largest step "
            f"{step.max():.1f} rates, steps with an entry above 5 rates: {(step > 5).mean():.1%}"
        )
        distance, step = (np.where(np.isfinite(x), x, np.nan) for x in (distance, step))
        # Wider lines first, so that those which coincide can all be seen.
        axes[0].plot(distance.mean(0), label=name, color=colour, lw=width)
        axes[1].plot(step.max(0), label=name, color=colour, lw=width / 2)
    axes[0].set(title="rms distance to the targets", yscale="log", ylim=(0.3, 30), xlabel="step")
    axes[1].set(title="largest entry of a step, in rates", yscale="log", ylim=(1, 1e6))
    axes[1].set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path)
    print(path)


if __name__ == "__main__":
    main()
