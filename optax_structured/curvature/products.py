"""Products with the Hessian and the Gauss-Newton matrix, and gradients of single examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Product = Callable[[Any], Any]


def hvp(loss: Callable[..., Any], params: Any, *args: Any) -> Product:
    r"""The map from v to the Hessian times v.

    .. math:: v \mapsto \nabla^2 f(w)\, v

    The gradient is linearised once: each product then costs about as much as a gradient.

    Args:
      loss: f, `loss(params, *args)`, () , with dropout and statistics frozen.
      params: w.
      *args: of the loss; the same batch for all products.

    Returns:
      A linear function of trees like `params`, which keeps their shardings.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> product = oxs.curvature.hvp(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]))
      >>> print(product(jnp.array([1.0, 0.0])))
      [4. 2.]
    """
    return jax.linearize(jax.grad(lambda p: loss(p, *args)), params)[1]


def ggn_vp(
    outputs: Callable[..., Any], loss: Callable[[Any], Any], params: Any, *args: Any
) -> Product:
    r"""The map from v to the generalised Gauss-Newton matrix times v.

    .. math:: v \mapsto J^\top H J\, v, \qquad J = \partial z / \partial w, \quad
        H = \nabla_z^2 \ell(z)

    Positive semidefinite where the loss is convex in the outputs, and equal to the Hessian where
    the outputs are linear in the parameters or the loss has no slope.

    Args:
      outputs: z, `outputs(params, *args)`, an array or tree of them.
      loss: of the outputs, () .
      params: w.
      *args: of the outputs.

    Returns:
      A linear function of trees like `params`, which keeps their shardings.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> product = oxs.curvature.ggn_vp(lambda w: w**2, lambda z: jnp.sum(z**2), jnp.ones(2))
      >>> print(product(jnp.array([1.0, 0.0])))
      [8. 0.]
    """
    z, forward = jax.linearize(lambda p: outputs(p, *args), params)
    backward = jax.linear_transpose(forward, params)
    curve = jax.linearize(jax.grad(loss), z)[1]
    return lambda v: backward(curve(forward(v)))[0]


def per_example(
    loss: Callable[..., Any], params: Any, batch: Any, *, chunk: int | None = None
) -> Any:
    """Gradients of the loss of each example by itself.

    Args:
      loss: `loss(params, batch)`, () , called with batches of one example.
      params: w.
      batch: a tree of arrays (n, ...).
      chunk: examples at a time, which bounds the memory of activations; None for all at once.

    Returns:
      A tree like `params` of arrays (n, ...): n copies of the parameters.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> print(oxs.curvature.per_example(loss, jnp.ones(2), jnp.eye(2)))
      [[2. 0.]
       [0. 2.]]
    """

    def one(example: Any) -> Any:
        return jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))

    if chunk is None:
        return jax.vmap(one)(batch)
    return jax.lax.map(one, batch, batch_size=chunk)


def output_kernel(outputs: Callable[[Any], Any], params: Any, *, chunk: int = 32) -> jax.Array:
    r"""Inner products of the gradients of all outputs: the neural tangent kernel.

    .. math:: K = J J^\top, \qquad J = \partial z / \partial w

    The Jacobian is never held: `chunk` rows of it at a time, each multiplied by J again.

    Args:
      outputs: `outputs(params)`, an array of n numbers in any shape.
      params: w.
      chunk: rows of the Jacobian at a time, each a copy of the parameters.

    Returns:
      (n, n), outputs in the order of their array, in its precision.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> X = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(oxs.curvature.output_kernel(lambda w: X @ w, jnp.zeros(2)))
      [[1. 1.]
       [1. 2.]]
    """
    z, forward = jax.linearize(outputs, params)
    backward = jax.linear_transpose(forward, params)

    def row(direction: jax.Array) -> jax.Array:
        return jnp.ravel(forward(backward(direction.reshape(z.shape))[0]))

    kernel = jax.lax.map(row, jnp.eye(z.size, dtype=z.dtype), batch_size=min(chunk, z.size))
    return (kernel + kernel.T) / 2
