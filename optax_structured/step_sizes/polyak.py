"""Where a stochastic line search starts, and what it compares its trials with."""

from typing import Any

import jax
import jax.numpy as jnp


def zhang_hager_reference(
    average: jax.Array, weight: jax.Array, value: jax.Array, xi: Any
) -> tuple[jax.Array, jax.Array]:
    r"""Average of losses with weights that fall by xi a step.

    .. math:: Q' = \xi Q + 1, \qquad C' = (\xi Q C + f)/Q'

    Args:
      average: C, () ; anything before the first loss.
      weight: Q, () ; 0 before the first loss.
      value: f, () , the new loss.
      xi: in [0, 1]; 1 is the plain average, 0 the last loss.

    Returns:
      `(average, weight)` with the new loss.

    Example:
      >>> import jax.numpy as jnp
      >>> average, weight = zhang_hager_reference(jnp.array(2.0), jnp.array(1.0), 4.0, 1.0)
      >>> print(average, weight)
      3.0 2.0
    """
    total = xi * weight + 1
    return (xi * weight * average + value) / total, total


def polyak_initial_step(value: Any, slope: Any, c_p: Any = 0.1, f_star: Any = 0.0) -> jax.Array:
    r"""Polyak's step for a loss whose smallest value is known.

    .. math:: \max(f - f^*, 0)\, /\, (c_p\, s + 10^{-8})

    Args:
      value: f, () .
      slope: s, () : the squared norm of the gradient, or its product with a descent direction.
      c_p: divides the step, above 0.
      f_star: the smallest value that f can have.

    Returns:
      The step, () , not clipped.

    Example:
      >>> print(f"{polyak_initial_step(0.5, 1.0):.2f}")
      5.00
    """
    return jnp.maximum(value - f_star, 0) / (c_p * slope + 1e-8)
