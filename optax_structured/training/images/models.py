"""Small networks in Flax, as fast as two CPU cores allow."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from optax_structured.training.names import check_known

NAMES = ("conv", "lenet", "mlp", "logistic")


class Conv(nn.Module):
    """A convolution as one matrix product over shifted copies of the image.

    XLA's CPU convolution does not use its fast kernels inside a loop such as `lax.scan`; this
    form does. The kernel has the usual layout, (height, width, in, out).
    """

    features: int
    window: int
    padding: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, channels = self.window, x.shape[-1]
        shape = (k, k, channels, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        border = (self.padding, self.padding)
        x = jnp.pad(x, ((0, 0), border, border, (0, 0)))
        height, width = x.shape[1] - k + 1, x.shape[2] - k + 1
        shifted = [x[:, i : i + height, j : j + width] for i in range(k) for j in range(k)]
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, self.features) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 window; an odd last row or column is dropped."""
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class ConvNet(nn.Module):
    """Convolutions, each followed by pooling and a ReLU, then dense layers."""

    channels: Sequence[int]
    window: int
    padding: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.channels:
            # Pooling first: the same function, and ReLU sees a quarter of the entries.
            x = nn.relu(max_pool(Conv(features, self.window, self.padding)(x)))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


class MLP(nn.Module):
    """Dense layers with ReLU between them; without hidden layers, logistic regression."""

    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


def make(name: str, image: tuple[int, ...], classes: int) -> nn.Module:
    """A network by name, for images of one shape.

    Args:
      name: "conv" (3x3: 16, 32, dense 64), "lenet" (5x5: 20, 50, dense 500, as published), "mlp"
        (512-256-128-64-32-16, as published), "logistic".
      image: (height, width, channels).
      classes: number of outputs.

    Raises:
      ValueError: an unknown name, or images too small for "lenet".
    """
    check_known("model", name, NAMES)
    if name == "conv":
        return ConvNet((16, 32), window=3, padding=1, hidden=64, classes=classes)
    if name == "lenet":
        if min(image[:2]) < 16:
            raise ValueError(
                f"lenet needs images of at least 16x16 (two 5x5 convolutions, two poolings), these "
                f"are {image[0]}x{image[1]}: use --model conv, or --data fashion-mnist"
            )
        return ConvNet((20, 50), window=5, padding=0, hidden=500, classes=classes)
    if name == "mlp":
        return MLP((512, 256, 128, 64, 32, 16), classes)
    return MLP((), classes)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the labels, in nats."""
    chosen = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], axis=-1)
    return -jnp.mean(chosen)


def init(model: nn.Module, image: tuple[int, ...], key: jax.Array) -> Any:
    """Fresh parameters."""
    return model.init(key, jnp.zeros((1, *image)))["params"]
