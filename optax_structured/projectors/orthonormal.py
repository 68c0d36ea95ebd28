r"""The small factorisations that projectors are fitted with.

All take batches of matrices, are exact for sign flips (the flip passes through), and return their
result placed as the argument is. Vectors to orthonormalise are rows, as bases are stored. Only here
the precision of products is the highest.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like, product, repeated
from optax_structured.projectors.base import transpose
from optax_structured.projectors.random_numbers import uniform
from optax_structured.xla.by_matrix import by_matrix

Orthonormalize = Literal["qr", "cholesky"]
HIGHEST = jax.lax.Precision.HIGHEST
_ROUNDS = 12  # of `cholesky_qr` at most; six are enough for float32 rows that are independent
_BLOCK = 128  # rows of the matrices that are factorised and inverted at once


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


def cholesky_qr(rows: jax.Array, precision: jax.lax.Precision = HIGHEST) -> jax.Array:
    r"""The same Q by rounds of Cholesky factorisations of r x r Gram matrices.

    Rows may be sharded along their length: each round is one sum of r x r numbers over the devices.

    A round scales rows to norm 1 and divides them by the factor of their Gram matrix, which squares
    the condition number: so that matrix is shifted until it is near the identity, and a round in
    which it cannot be factorised all the same is repeated with a larger shift. Each round divides
    the condition number by a hundred or more: two are enough for a warm basis, six for float32 rows
    of any condition. A row of zeros becomes a row of fixed numbers, and then what the others leave
    of it; so does, after those rounds, a row that the rows before it still explain.

    All of it is in the program once, in the body of the loop: compilers take seconds for each
    product of this precision.
    """
    dtype, rank = rows.dtype, rows.shape[-2]
    eps = float(jnp.finfo(dtype).eps)
    eye = jnp.eye(rank, dtype=dtype)
    spare = uniform(jnp.uint32(0), rank, rows.shape[-1], dtype)
    spare = like(jnp.broadcast_to(spare, rows.shape), rows)

    def scaled(rows: jax.Array) -> jax.Array:
        """Rows of norm 1."""
        rows = jnp.where(jnp.any(rows != 0, -1, keepdims=True), rows, spare)
        rows = rows / jnp.max(jnp.abs(rows), -1, keepdims=True, initial=jnp.finfo(dtype).tiny)
        return like(rows * jax.lax.rsqrt(jnp.sum(rows**2, -1, keepdims=True)), rows)

    def unfinished(carry: Any) -> jax.Array:
        turn, _, _, done = carry
        return (turn < _ROUNDS) & ~jnp.all(done)

    def round_(carry: Any) -> Any:
        turn, rows, shift, _ = carry
        rows = scaled(rows)
        gram = product(rows, rows, precision, transpose_b=True)
        # Rows are of norm 1, as products in three passes of bfloat16 do not find.
        angles = jnp.where(eye == 1, 0, gram)
        done = ~(jnp.max(jnp.abs(angles), (-2, -1), keepdims=True) > 32 * eps)  # NaN, too
        late = turn >= _ROUNDS // 2
        rows, shift = jax.lax.cond(jnp.all(done), kept, divided, rows, shift, gram, done, late)
        return turn + 1, rows, shift, done

    def kept(rows: jax.Array, shift: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rows, shift

    def divided(
        rows: jax.Array, shift: jax.Array, gram: jax.Array, done: jax.Array, late: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        near = jnp.sum((gram - eye) ** 2, (-2, -1), keepdims=True) < 0.25
        shifted = gram + jnp.where(near, 0, shift) * eye
        inverse = by_matrix(functools.partial(_inverse_factor, precision), shifted)
        new = like(product(inverse, rows, precision), rows)
        # One over the share of a row that those before it do not explain.
        factor = jnp.sum(jnp.where(eye == 1, inverse, 0), -1, keepdims=True)
        new = jnp.where(late & (factor > 10), spare, new)
        failed = ~jnp.isfinite(jnp.sum(new, (-2, -1), keepdims=True))
        return jnp.where(failed | done, rows, new), jnp.where(failed, 100 * shift, shift)

    zero = 0 * jnp.minimum(jnp.max(jnp.abs(rows), (-2, -1), keepdims=True), 1)  # or NaN: no turn
    shift = zero + 2 * rank * eps  # the norm of the Gram matrix is at most r
    return jax.lax.while_loop(unfinished, round_, (0, rows, shift, zero != 0))[1]


def orthonormal(rows: jax.Array) -> jax.Array:
    r"""Q of the factorisation LQ with positive diagonal of L, orthonormal for any rows.

    By Householder reflections, but on TPUs by `cholesky_qr`: there the former takes 43 s to compile
    for 1024 rows of 4096, and runs column by column. Products in three passes of bfloat16 are
    enough. The program chooses, not the process: it may be compiled for a machine that is not here.
    Figures: docs/pods.md.
    """
    on_tpu = functools.partial(cholesky_qr, precision=jax.lax.Precision.HIGH)
    return jax.lax.platform_dependent(rows, tpu=on_tpu, default=householder)


ORTHONORMALIZE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "qr": orthonormal,
    "cholesky": cholesky_qr,
}


def check_orthonormalize(value: str) -> None:
    """Raises ValueError for a name that is not in `ORTHONORMALIZE`."""
    if value not in get_args(Orthonormalize):
        raise ValueError(f"orthonormalize must be 'qr' or 'cholesky', got {value!r}")


def _inverse_factor(precision: jax.lax.Precision, gram: jax.Array) -> jax.Array:
    """The inverse X of the Cholesky factor L: products with it stay sharded, solves do not.

    A block of rows after the other, each from those before: L_i = A_i X', L_ii L_ii' = A_ii - L_i
    L_i', X_ii = inv(L_ii), X_i = -X_ii L_i X. The body of one loop, so that compilers see one small
    factorisation; TPUs take long to compile a solve with many right-hand sides, and to run it.
    """
    if gram.ndim > 2:
        return jax.vmap(functools.partial(_inverse_factor, precision))(gram)
    size, dtype = gram.shape[-1], gram.dtype
    block = min(size, _BLOCK)
    short = -size % block
    gram = jnp.pad(gram, (0, short)) + jnp.diag(
        jnp.pad(jnp.zeros(size, dtype), (0, short), constant_values=1)
    )
    eye = jnp.eye(block, dtype=dtype)

    def next_rows(i: jax.Array, inverse: jax.Array) -> jax.Array:
        at = i * block
        a = jax.lax.dynamic_slice_in_dim(gram, at, block)
        left = product(a, inverse, precision, transpose_b=True)
        square = jax.lax.dynamic_slice_in_dim(a, at, block, 1)
        square = square - product(left, left, precision, transpose_b=True)
        lower = jnp.linalg.cholesky(square)
        corner = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
        rows = -product(corner, product(left, inverse, precision), precision)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, corner, at, 1)
        return jax.lax.dynamic_update_slice_in_dim(inverse, rows, at, 0)

    inverse = jax.lax.fori_loop(0, (size + short) // block, next_rows, jnp.zeros_like(gram))
    return inverse[:size, :size]
