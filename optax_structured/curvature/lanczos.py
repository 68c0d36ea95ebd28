"""The Lanczos process on trees, and the quadrature that it stands for."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.curvature.products import Product
from optax_structured.trees.products import dot, rows_times


def lanczos(product: Product, start: Any, order: int) -> tuple[jax.Array, jax.Array]:
    r"""The tridiagonal matrix of a symmetric linear map on the Krylov space of a vector.

    All vectors are orthogonalised twice against all earlier ones, which takes `order` copies of
    the parameters. One `scan`: compile time does not depend on the order. Where the space is
    exhausted, all later numbers are 0. Vectors stay trees, and sharded leaves sharded:
    `matfree.decomp.tridiag_sym`, which gives the same numbers, takes one flat vector, for which
    sharded parameters have to be gathered.

    Args:
      product: symmetric, of trees like `start`.
      start: a vector other than 0.
      order: k, products.

    Returns:
      `(alpha, beta)`, (k,) and (k-1,): its diagonal and the diagonal beside it.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> alpha, beta = oxs.curvature.lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 2)
      >>> bool(jnp.allclose(alpha, 2.0)), bool(jnp.allclose(beta, 1.0))
      (True, True)

    References:
      Golub and Meurant, Matrices, Moments and Quadrature, 2010.
    """
    dtype = dot(start, start).dtype
    eps = jnp.finfo(dtype).eps
    scaled = lambda tree, c: jax.tree.map(lambda x: x * c.astype(x.dtype), tree)  # noqa: E731
    minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)  # noqa: E731

    def overlap(basis: Any, vector: Any) -> jax.Array:
        parts = jax.tree.map(lambda q, x: rows_times(q, x).astype(dtype), basis, vector)
        return sum(jax.tree.leaves(parts), jnp.zeros(order, dtype))

    def combine(basis: Any, numbers: jax.Array) -> Any:
        return jax.tree.map(
            lambda q: jnp.tensordot(numbers.astype(q.dtype), q, 1, precision="highest"), basis
        )

    def step(carry: Any, i: jax.Array) -> Any:
        basis, vector, scale = carry
        basis = jax.tree.map(lambda q, x: q.at[i].set(x), basis, vector)
        image = product(vector)
        alpha = dot(vector, image)
        scale = jnp.maximum(scale, jnp.sqrt(dot(image, image)))
        for _ in range(2):
            image = minus(image, combine(basis, overlap(basis, image)))
        beta = jnp.sqrt(dot(image, image))
        alive = beta > 10 * eps * scale
        beta = jnp.where(alive, beta, 0)
        following = scaled(image, jnp.where(alive, 1 / jnp.where(alive, beta, 1), 0))
        return (basis, following, scale), (alpha, beta)

    first = scaled(start, 1 / jnp.sqrt(dot(start, start)))
    nothing = jax.tree.map(jnp.zeros_like, first)
    basis = jax.tree.map(lambda x: jnp.broadcast_to(x, (order, *x.shape)), nothing)
    carry = (basis, first, jnp.zeros((), dtype))
    _, (alpha, beta) = jax.lax.scan(step, carry, jnp.arange(order))
    return alpha, beta[:-1]


def quadrature(alpha: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nodes and weights of the Gauss quadrature that a tridiagonal matrix stands for.

    Args:
      alpha: (k,), the diagonal.
      beta: (k-1,), the one beside it. What follows a 0 has no weight.

    Returns:
      `(nodes, weights)`, (k,) each, ascending; weights are at least 0 and add up to 1.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> nodes, weights = oxs.curvature.quadrature(jnp.array([2.0, 2.0]), jnp.array([1.0]))
      >>> print(nodes, weights)
      [1. 3.] [0.5 0.5]
    """
    matrix = jnp.diag(alpha) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
    nodes, vectors = jnp.linalg.eigh(matrix)
    weights = jnp.square(vectors[0])
    return nodes, weights / jnp.sum(weights)
