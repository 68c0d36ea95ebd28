"""Functions of symmetric positive definite matrices, differentiable where eigenvalues are equal."""

import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

Pairing: TypeAlias = Literal["transport", "lyapunov"]


def spd_power(matrix: jax.Array, exponent: float) -> jax.Array:
    r"""Power of symmetric positive definite matrices, :math:`U \operatorname{diag}(\lambda^p) U^T`.

    Its derivative is exact for all eigenvalues, equal ones included, where those of
    `jnp.linalg.eigh` are NaN: divided differences come from
    :math:`(ab)^{(p-1)/2} \sinh(pt/2) / \sinh(t/2)` with :math:`t = \log(a/b)`, not from a
    difference.

    Args:
      matrix: (..., d, d); the symmetric part is used. Eigenvalues below the rounding of the
        largest count as that much.
      exponent: p, a Python number: 0.5 for roots, -0.5 for inverse roots.

    Returns:
      Symmetric matrices like `matrix`. First derivatives, forward and reverse.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(jax.grad(lambda a: spd_power(a, 0.5)[0, 1])(jnp.eye(2)))
      [[0.   0.25]
       [0.25 0.  ]]
    """
    return _power(_symmetric(matrix), float(exponent))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _power(matrix: jax.Array, exponent: float) -> jax.Array:
    return _apply(*_eigh(matrix), exponent)


@_power.defjvp
def _(exponent: float, primals: Any, tangents: Any) -> Any:
    values, vectors = _eigh(primals[0])
    logs = jnp.log(values)
    half = (logs[..., :, None] - logs[..., None, :]) / 2
    near = jnp.abs(half) < jnp.finfo(half.dtype).eps
    safe = jnp.where(near, 1.0, half)
    ratio = jnp.where(near, exponent, jnp.sinh(exponent * safe) / jnp.sinh(safe))
    mean = jnp.exp((exponent - 1) / 2 * (logs[..., :, None] + logs[..., None, :]))
    change = _outward(vectors, mean * ratio * _inward(vectors, tangents[0]))
    return _apply(values, vectors, exponent), change


def spectral_product(kind: Pairing, metric: jax.Array, tangent: jax.Array) -> jax.Array:
    r"""Weighs a symmetric matrix in the eigenbasis of another, :math:`U(\phi(a_i,a_j) U^TWU)U^T`.

    Args:
      kind: `"transport"`, :math:`\phi = \sqrt{(x+y)/2}`: transport of the Bures-Wasserstein metric
        from I to A; `"lyapunov"`, :math:`\phi = 1/(x+y)`: the solution L of AL + LA = W.
      metric: A (..., d, d), symmetric positive definite.
      tangent: W (..., d, d), symmetric.

    Returns:
      Symmetric matrices. Derivatives are exact for equal eigenvalues of A too.

    Example:
      >>> import jax.numpy as jnp
      >>> print(spectral_product("lyapunov", 2 * jnp.eye(2), jnp.ones((2, 2))))
      [[0.25 0.25]
       [0.25 0.25]]
    """
    if kind not in _PAIRINGS:
        raise ValueError(f"kind must be one of {', '.join(_PAIRINGS)}, got {kind!r}")
    return _paired(kind, _symmetric(metric), _symmetric(tangent))


# phi(x, y), and its divided difference in the first argument, (phi(x, z) - phi(y, z)) / (x - y).
_PAIRINGS: dict[str, Any] = {
    "transport": (
        lambda x, y: jnp.sqrt((x + y) / 2),
        lambda x, y, z: 0.5 / (jnp.sqrt((x + z) / 2) + jnp.sqrt((y + z) / 2)),
    ),
    "lyapunov": (lambda x, y: 1 / (x + y), lambda x, y, z: -1 / ((x + z) * (y + z))),
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _paired(kind: str, metric: jax.Array, tangent: jax.Array) -> jax.Array:
    values, vectors = _eigh(metric)
    weight = _PAIRINGS[kind][0](values[..., :, None], values[..., None, :])
    return _outward(vectors, weight * _inward(vectors, tangent))


@_paired.defjvp
def _(kind: str, primals: Any, tangents: Any) -> Any:
    phi, slope = _PAIRINGS[kind]
    values, vectors = _eigh(primals[0])
    x, y, z = values[..., :, None, None], values[..., None, :, None], values[..., None, None, :]
    w, d_metric, d_w = (_inward(vectors, a) for a in (primals[1], *tangents))
    weight = phi(values[..., :, None], values[..., None, :])
    change = weight * d_w
    change += jnp.einsum("...ijk,...ij,...jk->...ik", slope(x, y, z), d_metric, w)
    change += jnp.einsum("...ijk,...ij,...jk->...ik", slope(y, z, x), w, d_metric)
    return _outward(vectors, weight * w), _outward(vectors, change)


def bures_wasserstein_exp(base: jax.Array, tangent: jax.Array) -> jax.Array:
    """The point where a geodesic with this tangent is after time 1, P + T + LPL.

    Args:
      base: P (..., d, d), symmetric positive definite.
      tangent: T (..., d, d), symmetric; L solves LP + PL = T.

    Returns:
      Symmetric positive semidefinite matrices, (I + L) P (I + L).

    Example:
      >>> import jax.numpy as jnp
      >>> print(bures_wasserstein_exp(jnp.eye(1), jnp.ones((1, 1))))
      [[2.25]]
    """
    step = spectral_product("lyapunov", base, tangent)
    return base + tangent + step @ base @ step


def bures_wasserstein_distance(p: jax.Array, q: jax.Array) -> jax.Array:
    r"""Squared distance of positive definite matrices.

    .. math:: \operatorname{tr} P + \operatorname{tr} Q
        - 2 \operatorname{tr} (Q^{1/2} P Q^{1/2})^{1/2}

    Args:
      p: (..., d, d).
      q: (..., d, d), or (d, d).

    Returns:
      (...).

    Example:
      >>> import jax.numpy as jnp
      >>> print(bures_wasserstein_distance(4 * jnp.eye(2), jnp.eye(2)))
      2.0
    """
    root = spd_power(q, 0.5)
    cross = spd_power(root @ p @ root, 0.5)
    return jnp.trace(p + q - 2 * cross, axis1=-2, axis2=-1)


def bures_wasserstein_geodesic(p: jax.Array, q: jax.Array, t: Any) -> jax.Array:
    """The point at share t of the way from p to q.

    Args:
      p: (..., d, d), where t is 0.
      q: (..., d, d), where t is 1.
      t: in [0, 1].

    Returns:
      (..., d, d).

    Example:
      >>> import jax.numpy as jnp
      >>> print(bures_wasserstein_geodesic(jnp.eye(1), 9 * jnp.eye(1), 0.5))
      [[4.]]
    """
    cross = _optimal_map(p, q)
    return (1 - t) ** 2 * p + t**2 * q + t * (1 - t) * (cross + jnp.swapaxes(cross, -1, -2))


def bures_wasserstein_mean_step(matrices: jax.Array) -> jax.Array:
    """One fixed-point step towards the Fréchet mean, from the arithmetic mean.

    Args:
      matrices: (n, d, d).

    Returns:
      (d, d).

    Example:
      >>> import jax.numpy as jnp
      >>> print(bures_wasserstein_mean_step(jnp.array([1.0, 9.0]).reshape(2, 1, 1)))
      [[4.]]
    """
    mean = jnp.mean(matrices, 0)
    root, inverse = spd_power(mean, 0.5), spd_power(mean, -0.5)
    middle = jnp.mean(spd_power(root @ matrices @ root, 0.5), 0)
    return inverse @ middle @ middle @ inverse


def _optimal_map(p: jax.Array, q: jax.Array) -> jax.Array:
    """P^{1/2} (P^{1/2} Q P^{1/2})^{1/2} P^{-1/2}, which is (PQ)^{1/2}."""
    root = spd_power(p, 0.5)
    return root @ spd_power(root @ q @ root, 0.5) @ spd_power(p, -0.5)


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    info = jnp.finfo(values.dtype)
    return jnp.maximum(values, jnp.maximum(info.eps * values[..., -1:], info.tiny)), vectors


def _apply(values: jax.Array, vectors: jax.Array, exponent: float) -> jax.Array:
    return (vectors * values[..., None, :] ** exponent) @ jnp.swapaxes(vectors, -1, -2)


def _inward(vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(vectors, -1, -2) @ matrix @ vectors


def _outward(vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    return vectors @ matrix @ jnp.swapaxes(vectors, -1, -2)
