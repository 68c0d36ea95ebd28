"""The two moves of randomised range finding: a random start, and a step of subspace iteration."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_structured.low_rank.projectors.base import transpose
from optax_structured.low_rank.projectors.hashing import uniform
from optax_structured.low_rank.projectors.orthonormal import magnitude
from optax_structured.trees.placement import product


def sketch(gradient: jax.Array, columns: int, seed: jax.Array) -> jax.Array:
    r"""(\*batch, size, columns): :math:`G \Omega`, one random matrix for the whole batch."""
    *batch, _, length = gradient.shape
    omega = uniform(seed, length, columns, gradient.dtype)
    omega = jnp.broadcast_to(omega, (*batch, length, columns))
    return product(gradient, omega / magnitude(gradient))


def power_step(
    gradient: jax.Array,
    q: jax.Array,
    orthonormalize: Callable[[jax.Array], jax.Array],
    between: bool = False,
) -> jax.Array:
    r"""(\*batch, size, columns): the orthonormal factor of :math:`G G^\top Q`.

    `between` orthonormalises the first product as well. The gradient is scaled through the small
    factors, so it is read once by each product and never copied.
    """
    scale = magnitude(gradient)
    y = product(transpose(gradient), q / scale)
    if between:
        y = orthonormalize(y)
    return orthonormalize(product(gradient, y / scale))
