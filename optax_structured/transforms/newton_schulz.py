"""Orthogonalised updates: every singular value brought near one, without a decomposition."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structured.meshes.placement import product
from optax_structured.trees.precision import as_updates, at_least_float32
from optax_structured.trees.tree_checks import check_real

Coefficients = tuple[float, float, float]
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    steps: int = 5, coefficients: Coefficients = QUINTIC, eps: float = 1e-7, *, dtype: Any = None
) -> optax.GradientTransformation:
    r"""Replaces each matrix by a nearby one with singular values close to one (Muon's direction).

    Starting from :math:`X = U / (\|U\|_F + \epsilon)`, turned so that it is wide, repeats

    .. math:: X \leftarrow a X + (b A + c A^2) X, \qquad A = X X^\top.

    With the standard coefficients singular values end between about 0.7 and 1.2, not at one.

    Args:
      steps: iterations, a Python int; 5.
      coefficients: a, b, c.
      eps: added to the norm, in the unit of the update; a matrix of zeros stays zero.
      dtype: in which to iterate; by default that of the leaf, float32 at least. `jnp.bfloat16` as
        in published runs.

    Returns:
      A stateless element for leaves of at least two axes: matrices in the last two, batches in the
      others.

    Raises:
      ValueError: a negative number of steps, or a leaf that holds no matrices.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> tx = oxs.transforms.orthogonalize()
      >>> updates, _ = tx.update(jnp.diag(jnp.array([5.0, 3.0])), tx.init(jnp.zeros((2, 2))))
      >>> print(jnp.linalg.svdvals(updates).round(1))
      [1.  0.7]

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}")

    def init(params: Any) -> optax.EmptyState:
        check_real("orthogonalize", params)
        for leaf in jax.tree.leaves(params):
            if jnp.ndim(leaf) < 2:
                raise ValueError(
                    f"orthogonalize got a leaf of shape {jnp.shape(leaf)}, but only matrices and "
                    "batches of them can be orthogonalised: send other leaves elsewhere with "
                    "optax.partition"
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        def one(u: jax.Array) -> jax.Array:
            x = at_least_float32(u) if dtype is None else u.astype(dtype)
            return newton_schulz(x, steps, coefficients, eps)

        return as_updates(jax.tree.map(one, updates), updates, params), state

    return optax.GradientTransformation(init, update)


def newton_schulz(
    x: jax.Array, steps: int = 5, coefficients: Coefficients = QUINTIC, eps: float = 1e-7
) -> jax.Array:
    """The iteration of `orthogonalize` on an array of matrices.

    Args:
      x: matrices in the last two axes.
      steps: iterations.
      coefficients: a, b, c.
      eps: added to the norm.

    Returns:
      An array like `x`.

    >>> print(newton_schulz(jnp.diag(jnp.array([5.0, 3.0]))).round(1)[0, 0])
    1.0
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = x / (norm + eps)
    for _ in range(steps):
        gram = product(x, jnp.swapaxes(x, -1, -2))
        polynomial = b * gram + c * product(gram, gram)
        x = (a * x + product(polynomial.astype(x.dtype), x)).astype(x.dtype)
    return jnp.swapaxes(x, -1, -2) if tall else x
