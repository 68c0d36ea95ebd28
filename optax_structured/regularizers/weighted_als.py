"""Weighted alternating least squares: the nuclear norm in a diagonal metric at a fixed rank."""

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def weighted_als(
    b: jax.Array,
    metric: jax.Array,
    strength: jax.Array,
    start: jax.Array,
    *,
    rank: int,
    sweeps: int,
) -> jax.Array:
    r"""Sweeps over the two factors of a matrix of at most `rank`, each half solved exactly.

    As :math:`\|W\|_* = \min_{W = A C^\top} \tfrac12(\|A\|_F^2 + \|C\|_F^2)` and the metric is
    diagonal, with :math:`C` held fixed each row of :math:`A` has its own small linear system

    .. math:: (C^\top \mathrm{diag}(P_{i\cdot})\, C + \tau I)\, a_i = C^\top b_{i\cdot}

    and likewise the rows of :math:`C`. However ill-conditioned :math:`P` is, these are exact.
    A sweep costs about :math:`2mnr^2 + (m+n)r^3/3` multiply-adds.

    Args:
        b: linear term, `(*batch, m, n)`.
        metric: :math:`P > 0`, like `b`.
        strength: :math:`\tau > 0`, a scalar.
        start: supplies the first row space, like `b`; where it is zero, `b` does.
        rank: bound on the rank, at least the rank of the minimiser, better 2 more.
        sweeps: number of sweeps, at least 1.

    Returns:
        The product of the factors, like `b`.
    """
    empty = jnp.all(start == 0, axis=(-2, -1), keepdims=True)
    _, s, rows = jnp.linalg.svd(jnp.where(empty, b, start), full_matrices=False)
    # A column of zeros would stay zero for good.
    s = jnp.maximum(s, 1e-3 * s[..., :1])[..., :rank]
    right = jnp.sqrt(s)[..., None, :] * jnp.swapaxes(rows[..., :rank, :], -1, -2)
    ridge = strength * jnp.eye(right.shape[-1], dtype=b.dtype)

    def fit(b: jax.Array, metric: jax.Array, other: jax.Array) -> jax.Array:
        """The best left factor for the right factor `other`, row by row."""
        gram = jnp.einsum("...ij,...jk,...jl->...ikl", metric, other, other, precision=_HIGHEST)
        target = jnp.matmul(b, other, precision=_HIGHEST)
        return jnp.linalg.solve(gram + ridge, target[..., None])[..., 0]

    b_t, metric_t = jnp.swapaxes(b, -1, -2), jnp.swapaxes(metric, -1, -2)

    def sweep(_: int, factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left = fit(b, metric, factors[1])
        return left, fit(b_t, metric_t, left)

    blank = jnp.zeros((*b.shape[:-1], right.shape[-1]), b.dtype)
    left, right = jax.lax.fori_loop(0, sweeps, sweep, (blank, right))
    return jnp.matmul(left, jnp.swapaxes(right, -1, -2), precision=_HIGHEST)
