"""The two moves of randomised range finding: a random start, and a step of subspace iteration."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import product, repeated
from optax_structured.projectors.orthonormal import magnitude
from optax_structured.projectors.random_numbers import uniform


def sketch(gradient: jax.Array, columns: int, seed: jax.Array) -> jax.Array:
    r"""(\*batch, columns, size): :math:`(G \Omega)^\top`, one random matrix for the whole batch."""
    *batch, _, length = gradient.shape
    omega = uniform(seed, columns, length, gradient.dtype)
    omega = jnp.broadcast_to(omega, (*batch, columns, length))
    return product(omega / repeated(magnitude(gradient), omega), gradient, transpose_b=True)


def power_step(
    gradient: jax.Array,
    rows: jax.Array,
    orthonormalize: Callable[[jax.Array], jax.Array],
    *,
    turned: bool = False,
    between: bool = False,
) -> tuple[jax.Array, jax.Array]:
    r"""(\*batch, columns, size): the orthonormal factor of :math:`G G^\top Q`, transposed like Q.

    What becomes the columns of P are rows, as bases are stored. `turned` reads the gradient as its
    transpose. `between` orthonormalises the first product as well. Else that is scaled, so that the
    second has the gradient's magnitude and not that of its square.

    Returns:
      That factor, and the `magnitude` of the first product.
    """
    y = product(rows, gradient, transpose_b=turned)
    peak = magnitude(y)
    y = orthonormalize(y) if between else y / repeated(peak, y)
    return orthonormalize(product(y, gradient, transpose_b=not turned)), peak
