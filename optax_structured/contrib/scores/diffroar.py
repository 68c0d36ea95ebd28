"""DiffROAR: do large input gradients mark what a network predicts from? And BlockMNIST."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def rank_by_input_gradient(
    score: Callable[..., jax.Array], inputs: jax.Array, *rest: Any
) -> jax.Array:
    """Ranks of the coordinates of each example, by the size of the gradient there.

    Args:
      score: `score(x, *rest)`, () : the loss of one example, or the logit of its class.
      inputs: n × shape.
      rest: further arguments with a leading axis n, such as labels.

    Returns:
      n × shape int32: 0 for the largest gradient. Ties are broken by position.

    Example:
      >>> import jax.numpy as jnp
      >>> print(rank_by_input_gradient(lambda x: x @ jnp.array([1.0, -3.0, 2.0]), jnp.ones((1, 3))))
      [[2 0 1]]
    """
    gradients = jax.vmap(jax.grad(score))(inputs, *rest)
    order = jnp.argsort(-jnp.abs(gradients).reshape(len(inputs), -1), axis=-1)
    return jnp.argsort(order, axis=-1).astype(jnp.int32).reshape(inputs.shape)


def mask_dataset(
    inputs: jax.Array,
    ranks: jax.Array,
    fraction: float,
    value: ArrayLike,
    *,
    most_important: bool = True,
) -> jax.Array:
    """Replaces the coordinates of the highest, or of the lowest, ranks by a constant.

    Retaining the top k is masking the least important 1 - k.

    Args:
      inputs: n × shape.
      ranks: of the same shape, from `rank_by_input_gradient`.
      fraction: share of the coordinates of each example, in [0, 1], rounded as Python rounds.
      value: the constant; published: the mean of the data.
      most_important: which end.

    Returns:
      n × shape.

    Example:
      >>> import jax.numpy as jnp
      >>> print(mask_dataset(jnp.array([[5.0, 6.0, 7.0]]), jnp.array([[2, 0, 1]]), 1 / 3, 0.0))
      [[5. 0. 7.]]
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    size = inputs[0].size
    count = round(fraction * size)
    masked = ranks < count if most_important else ranks >= size - count
    return jnp.where(masked, jnp.asarray(value, inputs.dtype), inputs)


class DiffROAR(NamedTuple):
    """Predictive power of what large and of what small gradients mark, level by level."""

    mean: jax.Array  # (levels,): of top - bottom over all pairs of runs; above 0: gradients inform
    std: jax.Array  # (levels,): of the same
    top: jax.Array  # (levels, runs): accuracy after retraining on the largest gradients
    bottom: jax.Array  # (levels, runs): on the smallest


def diffroar(
    power: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    keys: jax.Array,
    train: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array],
    levels: Sequence[float],
) -> DiffROAR:
    r"""Predictive power of the coordinates with large gradients, less that of the others.

    .. math:: \operatorname{DiffROAR}(k) = \operatorname{power}(\text{top } k) -
        \operatorname{power}(\text{bottom } k)

    Args:
      power: `power(key, train_inputs, test_inputs)`, () : trains a new model from `key` on the
        first and returns its accuracy on the second; labels are its own. Traced once.
      keys: (runs,) PRNG keys, 3 or more.
      train: inputs and their ranks.
      test: inputs and their ranks, by the same model.
      levels: shares k of the coordinates that are kept.

    Returns:
      A `DiffROAR`. What is dropped becomes the mean of the training inputs, in both sets.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> inputs, ranks = jnp.array([[1.0, 0.0]]), jnp.array([[0, 1]])
      >>> power = lambda key, x, x_test: jnp.sum(x_test[:, 0] == 1.0)
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> print(diffroar(power, keys, (inputs, ranks), (inputs, ranks), [0.5]).mean)
      [1.]

    References:
      Shah, Jain and Netrapalli, `Do Input Gradients Highlight Discriminative Features?
      <https://arxiv.org/abs/2102.12781>`_, 2021.
    """
    value = jnp.mean(train[0])
    retrain = jax.jit(jax.vmap(power, (0, None, None)))

    def powers(most_important: bool) -> jax.Array:
        """Of what is left when one end is masked."""
        masked = (
            [
                mask_dataset(*data, 1 - level, value, most_important=most_important)
                for data in (train, test)
            ]
            for level in levels
        )
        return jnp.stack([retrain(keys, *data) for data in masked])

    top, bottom = powers(False), powers(True)
    pairs = (top[:, :, None] - bottom[:, None, :]).reshape(len(top), -1)
    return DiffROAR(jnp.mean(pairs, -1), jnp.std(pairs, -1), top, bottom)


def block_images(
    key: jax.Array, signal: jax.Array, null: ArrayLike, *, signal_on_top: bool = False
) -> tuple[jax.Array, jax.Array]:
    """BlockMNIST: each image above or below a block that says nothing about its class.

    Args:
      key: a PRNG key, for the places.
      signal: (n, h, w) images, of digits as published.
      null: (h, w) or (n, h, w), the other block.
      signal_on_top: all signals on top, the easier set in which nothing leaks.

    Returns:
      (n, 2 h, w) images, and (n,) bool, where the signal is on top.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images, top = block_images(jax.random.key(0), jnp.ones((5, 2, 2)), jnp.zeros((2, 2)))
      >>> print(images.shape, images[:, 0, 0] == top)
      (5, 4, 2) [ True  True  True  True  True]
    """
    null = jnp.broadcast_to(jnp.asarray(null, signal.dtype), signal.shape)
    top = jax.random.bernoulli(key, shape=signal.shape[:1]) | signal_on_top
    upper, lower = (
        jnp.where(top[:, None, None], *pair) for pair in ((signal, null), (null, signal))
    )
    return jnp.concatenate([upper, lower], 1), top


def null_share(gradients: jax.Array, signal_on_top: jax.Array) -> jax.Array:
    """Share of the gradients of `block_images` that lies in the blocks without signal.

    Args:
      gradients: (n, 2 h, w), of the loss in the images.
      signal_on_top: (n,), from `block_images`.

    Returns:
      () in [0, 1]; 1/2 for gradients that do not tell the blocks apart. 0 where all are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(null_share(jnp.array([[[3.0], [1.0]]]), jnp.array([True])))
      0.25
    """
    size = jnp.sum(jnp.abs(gradients), -1)
    upper, lower = (jnp.sum(half, -1) for half in jnp.split(size, 2, axis=1))
    total = upper + lower
    share = jnp.where(signal_on_top, lower, upper) / jnp.where(total > 0, total, 1)
    return jnp.mean(share)
