r"""The small factorisations that projectors are fitted with.

All take batches of matrices, are exact for sign flips (the flip passes through), and return their
result placed as the argument is. Vectors to orthonormalise are rows, as bases are stored. Only here
the precision of products is the highest.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like, product, repeated
from optax_structured.projectors.base import transpose
from optax_structured.xla.by_matrix import by_matrix
from optax_structured.xla.conditional import branch

Orthonormalize = Literal["qr", "cholesky"]
HIGHEST = jax.lax.Precision.HIGHEST


def magnitude(x: jax.Array) -> jax.Array:
    r"""(\*batch,): the largest magnitude of each matrix, and never 0.

    Dividing by it keeps squares of gradients of any scale from overflow and underflow.
    """
    return jnp.max(jnp.abs(x), axis=(-2, -1), initial=jnp.finfo(x.dtype).tiny)


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


def householder(rows: jax.Array) -> jax.Array:
    r"""Q of the factorisation LQ with positive diagonal of L: orthonormal for any rows."""

    def one(rows: jax.Array) -> jax.Array:
        q, r = jnp.linalg.qr(transpose(rows))
        # As a masked sum: over a stride in a large stack the TPU compiler runs out of memory.
        diagonal = jnp.sum(jnp.where(jnp.eye(r.shape[-1], dtype=bool), r, 0), -1)
        q = transpose(q)
        return jax.lax.select(repeated(diagonal < 0, q), -q, q)

    return like(by_matrix(one, rows), rows)


def cholesky_qr2(rows: jax.Array) -> jax.Array:
    r"""The same Q from two Cholesky factorisations of r x r Gram matrices.

    Rows may be sharded along their length: each pass is one sum of r x r numbers over the devices.
    It squares the condition number, so rows are scaled to norm 1 and the first Gram matrix is
    shifted; and where the first pass leaves more than the second can correct (dependent rows, NaN
    from a failed factorisation) the result is that of `householder`.
    """
    dtype, rank = rows.dtype, rows.shape[-2]
    peak = jnp.max(jnp.abs(rows), -1, keepdims=True, initial=jnp.finfo(dtype).tiny)
    scaled = rows / peak
    norm = jnp.sqrt(jnp.sum(scaled**2, -1, keepdims=True))
    scaled = scaled / jnp.where(norm == 0.0, 1.0, norm)
    eye = jnp.eye(rank, dtype=dtype)
    shift = rank * jnp.finfo(dtype).eps  # the norm of the Gram matrix is at most r
    first = _whiten(scaled, product(scaled, scaled, HIGHEST, transpose_b=True) + shift * eye)
    gram = product(first, first, HIGHEST, transpose_b=True)
    # Up to a defect of 1/2 the second pass is as accurate as products are; False for NaN.
    good = jnp.sum((gram - eye) ** 2, (-2, -1), keepdims=True) <= 0.25
    second = _whiten(first, gram)
    return branch(jnp.any(~good), _mended, lambda good, q, rows: q, good, second, rows)


ORTHONORMALIZE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "qr": householder,
    "cholesky": cholesky_qr2,
}


def check_orthonormalize(value: str) -> None:
    """Raises ValueError for a name that is not in `ORTHONORMALIZE`."""
    if value not in get_args(Orthonormalize):
        raise ValueError(f"orthonormalize must be 'qr' or 'cholesky', got {value!r}")


def _mended(good: jax.Array, q: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(good, q, householder(rows))


def _whiten(rows: jax.Array, gram: jax.Array) -> jax.Array:
    """Q = L^-1 A with LL' the Gram matrix, as a product: products stay sharded, solves do not."""

    def inverse_factor(gram: jax.Array) -> jax.Array:
        lower = jnp.linalg.cholesky(gram)
        eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
        return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)

    return like(product(by_matrix(inverse_factor, gram), rows, HIGHEST), rows)
