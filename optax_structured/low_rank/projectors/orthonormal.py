r"""Orthonormal columns: the small factorisations that projectors are fitted with.

All take batches of matrices, are exact for sign flips of a column (the flip passes through), and
return their result placed as the argument is. Only here the precision of products is the highest.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from optax_structured.branch import branch
from optax_structured.low_rank.projectors.base import transpose
from optax_structured.trees.placement import by_matrix, like, product

Orthonormalize = Literal["qr", "cholesky"]
HIGHEST = jax.lax.Precision.HIGHEST


def magnitude(x: jax.Array) -> jax.Array:
    r"""(\*batch, 1, 1): the largest magnitude of each matrix, and never 0.

    Dividing by it keeps squares of gradients of any scale from overflow and underflow.
    """
    tiny = jnp.finfo(x.dtype).tiny
    return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=tiny)


def fix_signs(vectors: jax.Array) -> jax.Array:
    """The columns with signs such that the entry of largest magnitude is positive."""
    largest = jnp.max(vectors, -2, keepdims=True) + jnp.min(vectors, -2, keepdims=True)
    return vectors * jnp.where(largest < 0, -1, 1).astype(vectors.dtype)


def leading(gram: jax.Array, rank: int) -> jax.Array:
    """The leading eigenvectors of positive semidefinite matrices, largest eigenvalue first."""
    vectors = by_matrix(lambda gram: jnp.linalg.eigh(gram)[1], gram)
    return vectors[..., ::-1][..., :rank]


def singular_vectors(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    r""":math:`U` and :math:`V^\top` of the thin SVD."""
    u, _, vh = jnp.linalg.svd(a, full_matrices=False)
    return u, vh


def householder(a: jax.Array) -> jax.Array:
    """Q of the QR factorisation with positive diagonal of R: orthonormal whatever `a` is."""

    def one(a: jax.Array) -> jax.Array:
        q, _ = jnp.linalg.qr(a)
        diagonal = jnp.sum(q * a, -2, keepdims=True)  # of R, without a kernel to pick it
        return jnp.where(diagonal < 0, -q, q)

    return like(by_matrix(one, a), a)


def cholesky_qr2(a: jax.Array) -> jax.Array:
    r"""The same Q from two Cholesky factorisations of r x r Gram matrices.

    Rows may be sharded: each pass is one sum of r x r numbers over the devices. It squares the
    condition number, so columns are scaled to norm 1 and the first Gram matrix is shifted; and
    where the first pass leaves more than the second can correct (dependent columns, NaN from a
    failed factorisation) the result is that of `householder`.
    """
    peak = jnp.max(jnp.abs(a), -2, keepdims=True, initial=jnp.finfo(a.dtype).tiny)
    scaled = a / peak
    norm = jnp.sqrt(jnp.sum(scaled**2, -2, keepdims=True))
    scaled = scaled / jnp.where(norm == 0.0, 1.0, norm)
    rank = a.shape[-1]
    eye = jnp.eye(rank, dtype=a.dtype)
    shift = rank * jnp.finfo(a.dtype).eps  # the norm of the Gram matrix is at most r
    first = _whiten(scaled, product(transpose(scaled), scaled, HIGHEST) + shift * eye)
    gram = product(transpose(first), first, HIGHEST)
    # Up to a defect of 1/2 the second pass is as accurate as products are; False for NaN.
    good = jnp.sum((gram - eye) ** 2, (-2, -1), keepdims=True) <= 0.25
    second = _whiten(first, gram)
    return branch(jnp.any(~good), _mended, lambda good, q, a: q, good, second, a)


ORTHONORMALIZE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "qr": householder,
    "cholesky": cholesky_qr2,
}


def check_orthonormalize(value: str) -> None:
    """Raises ValueError for a name that is not in `ORTHONORMALIZE`."""
    if value not in get_args(Orthonormalize):
        raise ValueError(f"orthonormalize must be 'qr' or 'cholesky', got {value!r}")


def _mended(good: jax.Array, q: jax.Array, a: jax.Array) -> jax.Array:
    return jnp.where(good, q, householder(a))


def _whiten(a: jax.Array, gram: jax.Array) -> jax.Array:
    """Q = A R^-1 with R'R the Gram matrix, as a product: products stay sharded, solves do not."""

    def inverse_factor(gram: jax.Array) -> jax.Array:
        lower = jnp.linalg.cholesky(gram)
        eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
        return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)

    inverse = by_matrix(inverse_factor, gram)
    return like(product(a, transpose(inverse), HIGHEST), a)
