"""A LLaMA-style causal language model of bytes in Flax nnx, small enough for two CPU cores."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_structured.training.lm.text import BYTES


def mlp_width(width: int) -> int:
    """8/3 of the width, up to a multiple of 8: as many parameters as an MLP of 4 without a gate."""
    return -(-8 * width // 24) * 8


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of (batch, time, heads, size), base 10 000."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None, None] * rate
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(nnx.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query, self.key, self.value, self.out = (_linear(width, width, rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (f(x).reshape(shape) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class SwiGLU(nnx.Module):
    """The gated MLP."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        hidden = mlp_width(width)
        self.gate, self.up = _linear(width, hidden, rngs), _linear(width, hidden, rngs)
        self.down = _linear(hidden, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp = SwiGLU(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """Bytes (batch, time) to the logits of the byte that follows each, (batch, time, 256)."""

    def __init__(self, width: int, layers: int, heads: int, stacked: bool, rngs: nnx.Rngs) -> None:
        self.layers, self.stacked = layers, stacked
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(BYTES, width, embedding_init=small, rngs=rngs)
        if stacked:  # one module whose leaves are (layers, m, n)

            @nnx.split_rngs(splits=layers)
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> Block:
                return Block(width, heads, rngs)

            self.blocks = make(rngs)
        else:
            for i in range(layers):
                setattr(self, f"block_{i}", Block(width, heads, rngs))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, use_bias=False, kernel_init=small, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        if self.stacked:
            carry = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            x = carry(x, self.blocks)
        else:
            for i in range(self.layers):
                x = getattr(self, f"block_{i}")(x)
        return self.head(self.norm(x))


class Functional:
    """A `Decoder` as two pure functions of plain dictionaries of arrays."""

    def __init__(self, width: int, layers: int, heads: int, stacked: bool = False) -> None:
        def make(key: jax.Array) -> Decoder:
            return Decoder(width, layers, heads, stacked, nnx.Rngs(key))

        self._make = make
        self._graph, _ = nnx.split(nnx.eval_shape(make, jax.random.key(0)), nnx.Param)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, float32."""
        _, state = nnx.split(self._make(key), nnx.Param)
        return nnx.to_pure_dict(state)

    def losses(self, params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        """Negative log-likelihood in nats of each target, (batch, time), as the model's next."""
        logits = nnx.merge(self._graph, params)(tokens)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen
