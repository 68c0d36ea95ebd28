"""Conjugate directions for linear systems, with directions from any map, such as a network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optax_structured.trees.checks import check_nonnegative


class ConjugateDirections(NamedTuple):
    """Result of `conjugate_directions`."""

    x: Any  # like b
    residual_norms: jax.Array  # (max_steps + 1,): with the first; NaN after the last step
    steps: jax.Array  # () int32


def conjugate_directions(
    matvec: Callable[[Any], Any],
    b: Any,
    direction: Callable[[Any], Any],
    *,
    x0: Any = None,
    window: int = 2,
    rtol: float = 1e-6,
    max_steps: int = 100,
) -> ConjugateDirections:
    r"""Solves A x = b for a symmetric positive definite A, along A-orthogonalised proposals.

    With :math:`q = \phi(r / \|r\|)` for the residual :math:`r = b - Ax`,

    .. math:: d = q - \sum_j d_j \frac{q^\top A d_j}{d_j^\top A d_j}, \qquad
        x \leftarrow x + d\, \frac{r^\top d}{d^\top A d}

    over the last directions :math:`d_j`. Each step lowers the error in the A-norm, whatever
    :math:`\phi` is, as long as d is not orthogonal to r: it may be a network, a preconditioner
    that changes, or an inexact solver.

    Args:
      matvec: the product with A, of trees like b.
      b: a tree of arrays.
      direction: :math:`\phi`, of a tree of norm 1: an approximation of a multiple of
        :math:`A^{-1} r`. The identity gives conjugate gradients.
      x0: where to start; None: zero.
      window: how many directions to orthogonalise against. Two are enough for a linear symmetric
        direction, as good as all.
      rtol: of the residual's norm to that of the start.
      max_steps: at most.

    Returns:
      `ConjugateDirections`. Its x has the derivatives of :math:`A^{-1} b`, with another solve by
      the same directions; nothing is unrolled.

    Raises:
      ValueError: a window of less than 1 direction.

    Equals preconditioned conjugate gradients for a fixed symmetric positive definite direction, and
    one step for :math:`A^{-1}`.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> found = conjugate_directions(lambda x: a @ x, jnp.array([1.0, 2.0]), lambda r: r)
      >>> print(found.steps, jnp.abs(a @ found.x - jnp.array([1.0, 2.0])).max() < 1e-5)
      2 True

    References:
      Kaneda et al., `A Deep Conjugate Direction Method for Iteratively Solving Linear Systems
      <https://arxiv.org/abs/2205.10763>`_, 2023. Its two-term routine is followed: all inner
      products take the proposal itself, where its general one takes the running difference.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 direction, got {window}")
    check_nonnegative("rtol", rtol)
    start = jax.tree.map(jnp.zeros_like, b) if x0 is None else x0
    missing = b if x0 is None else jax.tree.map(jnp.subtract, b, matvec(x0))

    def solve(matvec: Callable[[Any], Any], b: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        flat, unravel = ravel_pytree(b)

        def product(x: jax.Array) -> jax.Array:
            return ravel_pytree(matvec(unravel(x)))[0]

        def go_on(carry: Any) -> jax.Array:
            step, norms = carry[0], carry[-1]
            return (step < max_steps) & (norms[step] > rtol * norms[0])

        def step(carry: Any) -> Any:
            count, x, r, directions, products, energies, norms = carry
            size = norms[count]
            q = ravel_pytree(direction(unravel(r / jnp.where(size > 0, size, 1))))[0]
            d = q - ((products @ q) / energies) @ directions
            product_d = product(d)
            energy = d @ product_d
            # Nothing is left in this direction once it has converged, or for a zero proposal.
            energy = jnp.where(energy > 0, energy, jnp.inf)
            x = x + d * (r @ d / energy)
            r = flat - product(x)
            norms = norms.at[count + 1].set(jnp.linalg.norm(r))
            kept = [
                a.at[count % window].set(new)
                for a, new in ((directions, d), (products, product_d), (energies, energy))
            ]
            return count + 1, x, r, *kept, norms

        none = jnp.zeros((window, flat.size), flat.dtype)
        norms = jnp.full(max_steps + 1, jnp.nan, flat.dtype).at[0].set(jnp.linalg.norm(flat))
        carry = (jnp.int32(0), 0 * flat, flat, none, none, jnp.ones(window, flat.dtype), norms)
        steps, x, *_, norms = jax.lax.while_loop(go_on, step, carry)
        return unravel(x), (norms, steps)

    x, (norms, steps) = jax.lax.custom_linear_solve(
        matvec, missing, solve, symmetric=True, has_aux=True
    )
    return ConjugateDirections(jax.tree.map(jnp.add, start, x), norms, steps)
