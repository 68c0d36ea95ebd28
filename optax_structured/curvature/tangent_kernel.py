"""The largest eigenvalue of the neural tangent kernel of each module."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.trees.products import dot


def mntk_eigenvalues(
    outputs: Callable[[Any], jax.Array],
    params: Any,
    labels: Any,
    key: jax.Array,
    *,
    iterations: int = 8,
) -> dict[str, jax.Array]:
    r"""Largest eigenvalue of the neural tangent kernel of each module.

    .. math:: \lambda_l = \lambda_{\max}(J_l J_l^\top), \qquad J_l = \partial z / \partial w_l

    by power iteration: one pass forward and one backward through the model each.

    Args:
      outputs: `outputs(params)`, an array: the outputs z for 16 to 64 examples, in evaluation mode.
      params: w.
      labels: a tree like the parameters of names of modules, as for `optax.partition`.
      key: of the random start.
      iterations: 5 to 10.

    Returns:
      Eigenvalues by name, each from below. The kernels of modules add up to that of the network.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> X = jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> found = oxs.curvature.mntk_eigenvalues(
      ...     lambda w: X @ jnp.stack([w["a"], w["b"]]), {"a": 0.0, "b": 0.0},
      ...     {"a": "first", "b": "second"}, jax.random.key(0),
      ... )
      >>> print({name: round(float(x), 3) for name, x in found.items()})
      {'first': 9.0, 'second': 2.0}

    References:
      Shi et al., `Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized
      Models <https://arxiv.org/abs/2405.07527>`_, NeurIPS 2023.
    """
    params = jax.tree.map(lambda p: jnp.asarray(p), params)
    z, forward = jax.linearize(outputs, params)
    backward = jax.linear_transpose(forward, params)
    start = jax.random.normal(key, z.shape, z.dtype)

    def largest(name: str) -> jax.Array:
        def apply(v: jax.Array) -> jax.Array:
            (gradient,) = backward(v)
            return forward(
                jax.tree.map(lambda g, at: g if at == name else jnp.zeros_like(g), gradient, labels)
            )

        def iterate(_: Any, v: jax.Array) -> jax.Array:
            image = apply(v)
            norm = jnp.sqrt(dot(image, image))
            return image / jnp.where(norm > 0, norm, 1).astype(image.dtype)

        v = jax.lax.fori_loop(0, iterations, iterate, start / jnp.sqrt(dot(start, start)))
        return dot(v, apply(v))

    return {name: largest(name) for name in sorted(set(jax.tree.leaves(labels)))}
