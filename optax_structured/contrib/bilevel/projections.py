"""Projections on sets that couple several variables; those of one are in `optax.projections`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

Projection = Callable[[Any], Any]  # a point, a tree -> the nearest point of the set


def affine_projection(matrix: ArrayLike, offset: ArrayLike = 0.0) -> Projection:
    r"""Projection on the solutions of linear equations, :math:`w - A^+(Aw - b)`.

    Args:
      matrix: A (equations, size), of any rank; columns in the order of the raveled point.
      offset: b, (equations,) or a number; in the range of A.

    Returns:
      A function of a tree with `size` numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = affine_projection(jnp.ones((1, 2)))((jnp.array(3.0), jnp.array(1.0)))
      >>> print(f"{x:.2f} {y:.2f}")
      1.00 -1.00
    """
    matrix = jnp.asarray(matrix)
    inverse = jnp.linalg.pinv(matrix)

    def project(point: Any) -> Any:
        flat, unravel = ravel_pytree(point)
        return unravel(flat - inverse @ (matrix @ flat - offset))

    return project


def dykstra(*projections: Projection, rounds: int = 20) -> Projection:
    r"""Projection on the intersection of convex sets, from projections on each of them.

    Args:
      projections: on the single sets.
      rounds: how often each of them is called. The last set is met exactly, the others in the
        limit.

    Returns:
      A function of a tree.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> corner = dykstra(affine_projection(jnp.array([[1.0, -1.0]])),
      ...                  optax.projections.projection_non_negative)
      >>> print(corner(jnp.array([-2.0, 1.0])))
      [0. 0.]
    """
    if not projections or rounds < 1:
        raise ValueError("dykstra takes one projection or more, and at least one round")

    def project(point: Any) -> Any:
        def round_(_: Any, carry: Any) -> Any:
            point, removed = carry
            kept = []
            for projection, before in zip(projections, removed, strict=True):
                moved = jax.tree.map(jnp.add, point, before)
                point = projection(moved)
                kept.append(jax.tree.map(jnp.subtract, moved, point))
            return point, tuple(kept)

        zero = jax.tree.map(jnp.zeros_like, point)
        return jax.lax.fori_loop(0, rounds, round_, (point, (zero,) * len(projections)))[0]

    return project
