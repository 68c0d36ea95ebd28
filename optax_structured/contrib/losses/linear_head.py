"""Hessian alignment of a linear softmax head in closed form: no probes, no third derivatives."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.contrib.losses.alignment import Reference, mean_over_environments, spread
from optax_structured.trees.precision import at_least_float32

ExactMethod = Literal["hgp", "diagonal", "frobenius"]


class SoftmaxHead(NamedTuple):
    """What the derivatives of one environment's cross-entropy in a linear head are made of."""

    inputs: jax.Array  # (n, d + 1): a, features and a one
    probabilities: jax.Array  # (n, classes): p
    residuals: jax.Array  # (n, classes): p minus the one-hot label
    shares: jax.Array  # (n,): weights of the examples, of sum 1

    def gradient(self) -> jax.Array:
        """(d + 1, classes): the last row is that of the bias."""
        return jnp.einsum("i,id,ik->dk", self.shares, self.inputs, self.residuals)

    def product(self, v: jax.Array) -> jax.Array:
        """(d + 1, classes): the Hessian times v of that shape."""
        p, slope = self.probabilities, self.inputs @ v
        curved = p * (slope - jnp.sum(p * slope, -1, keepdims=True))
        return jnp.einsum("i,id,ik->dk", self.shares, self.inputs, curved)

    def diagonal(self) -> jax.Array:
        """(d + 1, classes): the diagonal of the Hessian."""
        p = self.probabilities
        return jnp.einsum("i,id,ik->dk", self.shares, jnp.square(self.inputs), p * (1 - p))

    def inner(self, other: "SoftmaxHead") -> jax.Array:
        """(): inner product of two Hessians, from products of the size of a batch."""
        p, q = self.probabilities, other.probabilities
        same_example = jnp.square(self.inputs @ other.inputs.T)
        both = p @ q.T
        traces = both - p @ jnp.square(q).T - jnp.square(p) @ q.T + jnp.square(both)
        return self.shares @ (same_example * traces) @ other.shares


def softmax_head(
    kernel: ArrayLike,
    bias: ArrayLike,
    features: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
) -> SoftmaxHead:
    r"""Gradient and Hessian of the mean cross-entropy of a linear head.

    With :math:`a = (x, 1)`, :math:`p = \operatorname{softmax}(a^\top V)` and V the kernel over the
    bias,

    .. math:: g = \mathbb{E}[a\,(p - e_y)^\top], \qquad
        H = \mathbb{E}\big[(\operatorname{diag} p - pp^\top) \otimes aa^\top\big].

    Args:
      kernel: (d, classes).
      bias: (classes,).
      features: (n, d).
      labels: (n,) integers.
      weights: (n,) weights of the examples, or a mask; at least one above 0.

    Returns:
      A `SoftmaxHead`, float32 or wider, whose methods are the gradient, products with the Hessian,
      its diagonal, and inner products of two Hessians.

    Example:
      >>> import jax.numpy as jnp
      >>> head = softmax_head(jnp.zeros((1, 2)), jnp.zeros(2), jnp.ones((1, 1)), jnp.array([0]))
      >>> print(head.gradient()[0], head.diagonal()[0], head.inner(head))
      [-0.5  0.5] [0.25 0.25] 1.0
    """
    kernel, bias, features = (at_least_float32(x) for x in (kernel, bias, features))
    shares = jnp.ones(len(features)) if weights is None else jnp.asarray(weights)
    inputs = jnp.concatenate([features, jnp.ones_like(features[:, :1])], 1)
    p = jax.nn.softmax(features @ kernel + bias)
    residuals = p - jax.nn.one_hot(labels, p.shape[1], dtype=p.dtype)
    shares = shares.astype(p.dtype)
    return SoftmaxHead(inputs, p, residuals, shares / jnp.sum(shares))


def linear_head_alignment_penalty(
    kernel: ArrayLike,
    bias: ArrayLike,
    features: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike,
    beta: ArrayLike,
    method: ExactMethod = "diagonal",
    reference: Reference = "mean_loss",
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""`hessian_alignment_penalty` of a linear head under softmax cross-entropy, in closed form.

    Args:
      kernel: (d, classes).
      bias: (classes,).
      features: (E, n, d), one block for each environment.
      labels: (E, n) integers.
      alpha: weight of the curvature term.
      beta: weight of the gradient term.
      method: what is aligned: `"hgp"` :math:`H_e g_e`, `"diagonal"` the exact diagonal, the limit
        of `"hutchinson"` for many probes, or `"frobenius"` the whole Hessian,
        :math:`\|H_e - \bar H\|_F^2`. The last takes :math:`(En)^2` numbers, and resolves
        differences down to :math:`3\cdot10^{-4}\|H\|` in float32.
      reference: of `"hgp"`.
      weights: (E, n) weights of the examples, or a mask.

    Returns:
      () float32 or wider.

    Raises:
      ValueError: an unknown method.

    Equals `hessian_alignment_penalty` with `"hgp"`, and with `"hutchinson"` in the limit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> head, labels = (jnp.zeros((3, 2)), jnp.zeros(2)), jnp.zeros((2, 8), int)
      >>> alike = jnp.ones((2, 8, 3))
      >>> print(linear_head_alignment_penalty(*head, alike, labels, alpha=1.0, beta=1.0))
      0.0
    """
    if method not in get_args(ExactMethod):
        known = ", ".join(get_args(ExactMethod))
        raise ValueError(f"method must be one of {known}, got {method!r}")
    weights = jnp.ones(jnp.shape(labels)) if weights is None else jnp.asarray(weights)
    heads = jax.vmap(softmax_head, (None, None, 0, 0, 0))(kernel, bias, features, labels, weights)
    slopes = jax.vmap(SoftmaxHead.gradient)(heads)
    mean_slope = mean_over_environments(slopes)
    if method == "frobenius":
        curved = _hessian_spread(heads)
    else:
        if method == "diagonal":
            curvatures = of_mean = jax.vmap(SoftmaxHead.diagonal)(heads)
        else:
            curvatures = of_mean = jax.vmap(SoftmaxHead.product)(heads, slopes)
            if reference == "mean_loss":
                of_mean = jax.vmap(SoftmaxHead.product, (0, None))(heads, mean_slope)
        curved = spread(curvatures, mean_over_environments(of_mean))
    return jnp.asarray(alpha * curved + beta * spread(slopes, mean_slope))


def _hessian_spread(heads: SoftmaxHead) -> jax.Array:
    """Mean squared Frobenius distance of the Hessians from their mean, which is a constant."""
    constant = jax.lax.stop_gradient(heads)
    own = jax.vmap(SoftmaxHead.inner)(heads, heads)
    pairs = jax.vmap(jax.vmap(SoftmaxHead.inner, (None, 0)), (0, None))
    return (
        jnp.mean(own) - 2 * jnp.mean(pairs(heads, constant)) + jnp.mean(pairs(constant, constant))
    )
