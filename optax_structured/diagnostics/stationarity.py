"""How far a point is from the end: the regularised objective, and its distance to stationarity."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.diagnostics.penalised import regularised
from optax_structured.regularizers import L1, GroupLasso, NuclearNorm, Regularizer
from optax_structured.regularizers.coupled import joined
from optax_structured.trees import resolve


def objective(loss: Any, w: Any, structure: Any, strength: Any) -> jax.Array:
    r"""The regularised objective, :math:`F(w) + \lambda \sum \psi(w)`, from the loss at `w`.

    Args:
      loss: F(w), a scalar.
      w: parameters, or the prox point.
      structure: as in `structured_sparsity`.
      strength: lambda, a scalar.

    Returns:
      A scalar.

    >>> print(objective(3.0, jnp.array([1.0, -2.0]), L1(), 0.1))
    3.3
    """
    penalty = sum((spec.value(leaf) for leaf, spec in regularised(w, structure)), jnp.zeros(()))
    return loss + strength * penalty


def stationarity(w: Any, gradient: Any, structure: Any, strength: Any) -> jax.Array:
    r"""Distance from 0 to the subdifferential of the objective, for norms that split into blocks.

    .. math:: \Big( \sum_{w_g \ne 0} \big\|G_g + \lambda\omega \tfrac{w_g}{\|w_g\|}\big\|^2
        + \sum_{w_g = 0} \max(0, \|G_g\| - \lambda\omega)^2 \Big)^{1/2}

    and the like for `L1` and `NuclearNorm`; a plain leaf adds the norm of its gradient.

    Args:
      w, structure, strength: as in `objective`.
      gradient: of the loss at `w`, full or of a large batch: with noise the distance does not
        vanish.

    Returns:
      A scalar; 0 exactly at stationary points.

    Raises:
      NotImplementedError: a regularizer other than `GroupLasso`, `L1`, `NuclearNorm`.

    >>> print(stationarity(jnp.array([0.0, 1.0]), jnp.array([0.3, -0.5]), L1(), 0.5))
    0.0
    """
    specs, leaves, slopes = resolve(structure, w), jax.tree.leaves(w), jax.tree.leaves(gradient)
    residuals = [slope for slope, spec in zip(slopes, specs, strict=True) if spec is None]
    for joint in joined(specs, [jnp.shape(leaf) for leaf in leaves]):
        at, slope = joint.matrix(leaves), joint.matrix(slopes)
        residuals.append(_residual(at, slope, joint.regularizer, strength))
    squares = [jnp.sum(jnp.square(x)) for x in residuals]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def _residual(w: jax.Array, gradient: jax.Array, spec: Regularizer, strength: Any) -> jax.Array:
    """The subgradient of least norm (for a nuclear norm: something of the same norm)."""
    if isinstance(spec, NuclearNorm):
        return _nuclear_residual(w, gradient, spec, strength)
    if not isinstance(spec, (GroupLasso, L1)):
        raise NotImplementedError(
            f"stationarity knows the subgradients of GroupLasso, L1 and NuclearNorm, not of {spec}"
        )
    alive = jnp.expand_dims(spec.support(w), spec.coupled_axes(w.ndim))
    smooth = gradient + strength * jax.grad(spec.value)(w)
    # In a zero block the subgradients fill the dual ball: what sticks out of it is a prox.
    return jnp.where(alive, smooth, spec.prox(-gradient, 1.0, strength))


def _nuclear_residual(
    w: jax.Array, gradient: jax.Array, spec: NuclearNorm, strength: Any
) -> jax.Array:
    u, _, vt = jnp.linalg.svd(spec.axes.to_matrix(w), full_matrices=False)
    alive = spec.support(w)
    u, vt = u * alive[..., None, :], vt * alive[..., :, None]
    g = spec.axes.to_matrix(gradient)
    normal = g - u @ (u.mT @ g)
    normal = normal - (normal @ vt.mT) @ vt
    tangent = g - normal + strength * (u @ vt)
    outside = jnp.maximum(jnp.linalg.svd(normal, compute_uv=False) - strength, 0.0)
    return jnp.concatenate([tangent.ravel(), outside.ravel()])
