"""TangleNAS: search over sizes of a layer by one product with its largest weight."""

import dataclasses
import functools
import string
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_structured.trees.checks import check_choice

Sampler: TypeAlias = Literal["softmax", "sparsemax", "dirichlet", "gumbel", "uniform"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Sizes to choose from, along one axis of a weight or along several together.

    Args:
      axes: the axis, or axes that have the same size, as both of a square kernel.
      sizes: the choices, each at most the size of the axes.
      centred: whether a choice is the window in the middle, as of kernels, or the first entries,
        as of channels.

    >>> Decision(axes=(2, 3), sizes=(3, 5), centred=True).window(3, 5)
    slice(1, 4, None)
    """

    axes: int | tuple[int, ...]
    sizes: tuple[int, ...]
    centred: bool = False

    def window(self, size: int, full: int) -> slice:
        """The entries that a choice uses, of `full` along an axis."""
        if not 0 < size <= full or (self.centred and (full - size) % 2):
            kind = "a centred window of" if self.centred else "the first"
            raise ValueError(
                f"Decision(axes={self.axes}): {kind} {size} of {full} entries; sizes are 1 to "
                f"{full}, and centred ones leave the same number on both sides"
            )
        start = (full - size) // 2 if self.centred else 0
        return slice(start, start + size)

    def axes_of(self, ndim: int) -> tuple[int, ...]:
        """The axes of an array of `ndim` axes, counted from its front."""
        axes = (self.axes,) if isinstance(self.axes, int) else self.axes
        return tuple(range(ndim)[axis] for axis in axes)


def superposition_mask(
    shape: tuple[int, ...], decisions: Sequence[Decision], weights: Any
) -> jax.Array:
    r"""What a weighted sum of slices multiplies the largest weight by.

    Slices are nested boxes, so that the sum of all of them, each padded by zeros to the full
    shape, is an elementwise product, :math:`\sum_c a_c \operatorname{pad}(W_c) = S \odot W`; and
    for independent decisions S is a product of one factor for each,

    .. math:: S[o, i, h, w] = S_{out}[o]\, S_{in}[i]\, S_{kernel}[h, w], \qquad
        S_{out}[o] = \sum_{c\,:\,\text{choice } c \text{ has } o} a_c.

    Args:
      shape: of the largest weight.
      decisions: on disjoint axes.
      weights: one vector a decision, of its choices; or one array with an axis for each decision,
        of joint weights. They come from `architecture_weights`.

    Returns:
      S, of a shape that broadcasts to `shape`.

    Raises:
      ValueError: sizes that do not fit, or weights that do not belong to the decisions.

    Equals ones where all weight is on the largest choices.

    Example:
      >>> import jax.numpy as jnp
      >>> width = Decision(axes=0, sizes=(1, 3))
      >>> print(superposition_mask((3,), (width,), [jnp.array([0.25, 0.75])]))
      [1.   0.75 0.75]
    """
    covers = [_cover(decision, shape) for decision in decisions]
    separate = isinstance(weights, list | tuple)
    found = [size for x in (weights if separate else [weights]) for size in jnp.shape(x)]
    if found != [len(cover) for cover in covers]:
        raise ValueError(
            f"superposition_mask: decisions of {[len(cover) for cover in covers]} choices, but "
            f"weights of shape {found}; one vector a decision, or one array with an axis for each"
        )
    if not separate:
        return _of_joint_weights(jnp.asarray(weights), covers)
    factors = [jnp.tensordot(x, _as(cover, x), 1) for x, cover in zip(weights, covers, strict=True)]
    return functools.reduce(jnp.multiply, factors)


def superpose(weight: ArrayLike, decisions: Sequence[Decision], weights: Any) -> jax.Array:
    """The weighted sum of the slices of a weight, padded to its shape: one elementwise product.

    Args:
      weight: the largest tensor: of a convolution, linear layer, embedding or normalisation.
      decisions, weights: see `superposition_mask`.

    Returns:
      An array like `weight`. A bias takes the decisions on the output axis alone.

    Example:
      >>> import jax.numpy as jnp
      >>> width = Decision(axes=1, sizes=(1, 2))
      >>> print(superpose(jnp.ones((2, 2)), (width,), [jnp.array([0.5, 0.5])]))
      [[1.  0.5]
       [1.  0.5]]

    References:
      Sukthanker et al., `Weight-Entanglement Meets Gradient-Based Neural Architecture Search
      <https://arxiv.org/abs/2312.10440>`_, 2024. Its code adds up the padded slices one by one.
    """
    weight = jnp.asarray(weight)
    return weight * superposition_mask(weight.shape, decisions, weights).astype(weight.dtype)


def extract(weight: ArrayLike, decisions: Sequence[Decision], choices: Sequence[int]) -> jax.Array:
    """The slice of a weight that was chosen, as the search ends.

    Args:
      weight: the largest tensor.
      decisions: see `superposition_mask`.
      choices: the index of the choice of each decision, such as the argmax of its logits.

    Returns:
      A smaller tensor.

    Example:
      >>> import jax.numpy as jnp
      >>> print(extract(jnp.arange(5.0), (Decision(0, (3, 5), centred=True),), [0]))
      [1. 2. 3.]
    """
    weight = jnp.asarray(weight)
    index = [slice(None)] * weight.ndim
    for decision, choice in zip(decisions, choices, strict=True):
        for axis in decision.axes_of(weight.ndim):
            index[axis] = decision.window(decision.sizes[int(choice)], weight.shape[axis])
    return weight[tuple(index)]


def architecture_weights(
    logits: ArrayLike,
    sampler: Sampler = "softmax",
    key: jax.Array | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    r"""Weights of the choices of one decision, differentiable in its logits.

    Args:
      logits: (choices,).
      sampler: `"softmax"` (DARTS), `"sparsemax"` (its projection on the simplex), `"dirichlet"`
        (DrNAS: a draw from :math:`\operatorname{Dir}(\operatorname{elu}(\alpha) + 1)`),
        `"gumbel"` (GDAS: one-hot, with the derivative of a softmax), or `"uniform"` (SPOS:
        one-hot, independent of the logits).
      key: a PRNG key for the last three.
      temperature: of `"gumbel"`, above 0; published: 10 down to 0.1, linearly.

    Returns:
      (choices,) of sum 1.

    Raises:
      ValueError: an unknown sampler, or one that draws without a key.

    Example:
      >>> import jax.numpy as jnp
      >>> print(architecture_weights(jnp.array([0.0, 0.0, -2.0]), "sparsemax"))
      [0.5 0.5 0. ]
    """
    check_choice("sampler", sampler, Sampler)
    logits = jnp.asarray(logits)
    if sampler == "softmax":
        return jax.nn.softmax(logits)
    if sampler == "sparsemax":
        return jnp.asarray(optax.projections.projection_simplex(logits))
    if key is None:
        raise ValueError(f"architecture_weights: sampler={sampler!r} draws; give it a key")
    if sampler == "dirichlet":
        return jax.random.dirichlet(key, jax.nn.elu(logits) + 1)
    if sampler == "uniform":
        return jax.nn.one_hot(jax.random.randint(key, (), 0, logits.size), logits.size)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax((logits + noise) / temperature)
    hard = jax.nn.one_hot(jnp.argmax(soft), logits.size, dtype=soft.dtype)
    return hard + soft - jax.lax.stop_gradient(soft)


def _cover(decision: Decision, shape: tuple[int, ...]) -> np.ndarray:
    """(choices, ...): which entries each choice has, of a shape that broadcasts to `shape`."""
    axes = decision.axes_of(len(shape))
    sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    cover = np.zeros((len(decision.sizes), *sizes), bool)
    for row, size in zip(cover, decision.sizes, strict=True):
        window = [slice(None)] * len(shape)
        for axis in axes:
            window[axis] = decision.window(size, shape[axis])
        row[tuple(window)] = True
    return cover


def _of_joint_weights(weights: jax.Array, covers: list[np.ndarray]) -> jax.Array:
    """Sum over all combinations of choices of the weight times the product of their covers."""
    choices, axes = string.ascii_lowercase, string.ascii_uppercase
    terms, shape = [choices[: weights.ndim]], [1] * (covers[0].ndim - 1)
    for name, cover in zip(terms[0], covers, strict=True):
        own = [axis for axis, size in enumerate(cover.shape[1:]) if size > 1]
        terms.append(name + "".join(axes[axis] for axis in own))
        for axis in own:
            shape[axis] = cover.shape[1 + axis]
    kept = "".join(axes[axis] for axis, size in enumerate(shape) if size > 1)
    parts = [
        _as(cover.reshape([n for i, n in enumerate(cover.shape) if n > 1 or not i]), weights)
        for cover in covers
    ]
    return jnp.einsum(f"{','.join(terms)}->{kept}", weights, *parts).reshape(shape)


def _as(cover: np.ndarray, like: ArrayLike) -> jax.Array:
    return jnp.asarray(cover, jnp.result_type(like))
