"""Low-rank matrix completion by alternating least squares that need not be solved exactly."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.trees.checks import check_nonnegative, check_positive

Solver: TypeAlias = Literal["cholesky", "pcg"]


class MatrixCompletion(NamedTuple):
    """Result of `alternating_least_squares`: the matrix is `left @ right.T`."""

    left: jax.Array  # (rows, rank)
    right: jax.Array  # (columns, rank)
    losses: jax.Array  # (sweeps,): half the sum of squared errors at the observed entries


def alternating_least_squares(
    rows: ArrayLike,
    columns: ArrayLike,
    values: ArrayLike,
    shape: tuple[int, int],
    rank: int,
    *,
    key: jax.Array,
    sweeps: int = 20,
    solver: Solver = "cholesky",
    inner_steps: int = 4,
    ridge: float = 1e-8,
    incoherence: float = 3.0,
) -> MatrixCompletion:
    r"""Finds a matrix of low rank from some of its entries.

    .. math:: \min_{U, V} \tfrac12 \sum_{(i,j) \in \Omega} (u_i^\top v_j - M_{ij})^2

    in turn over V and U, one small problem a row. The start is the span of the observed matrix, by
    subspace iteration, without rows that are too long; U is orthonormalised before each turn.
    Errors of the single problems, relative to their solutions, leave the linear rate as it is: with
    `"pcg"` each is a few steps of preconditioned conjugate gradients from the last sweep, and a
    sweep costs :math:`|\Omega| k` numbers instead of :math:`|\Omega| k^2`. This tolerance is what
    the paper calls robust; outliers are not tolerated.

    Args:
      rows: (observed,) of int.
      columns: (observed,) of int.
      values: (observed,).
      shape: of the matrix.
      rank: k.
      key: of the start of the subspace iteration.
      sweeps: over V and U; 10 to 50.
      solver: `"cholesky"`, exact, with (n, k, k) numbers; or `"pcg"`.
      inner_steps: of `"pcg"`.
      ridge: times the mean diagonal, for rows with fewer than k entries.
      incoherence: :math:`\mu`; rows of the start longer than :math:`2\mu\sqrt{k/m}` become 0.

    Returns:
      A `MatrixCompletion`. All entries are used in each sweep; the paper splits them for its proof.

    Raises:
      ValueError: lengths that differ, a rank above both sides, an unknown solver.

    Equals the truncated SVD after one sweep, where all of a matrix of rank k is observed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> matrix = jax.random.normal(keys[0], (30, 2)) @ jax.random.normal(keys[1], (2, 20))
      >>> rows, columns = jnp.nonzero(jax.random.bernoulli(keys[2], 0.6, (30, 20)))
      >>> found = alternating_least_squares(
      ...     rows, columns, matrix[rows, columns], (30, 20), 2, key=keys[0])
      >>> print(bool(jnp.abs(found.left @ found.right.T - matrix).max() < 1e-3))
      True

    References:
      Gu, Song, Yin and Zhang, `Low Rank Matrix Completion via Robust Alternating Minimization in
      Nearly Linear Time <https://arxiv.org/abs/2302.11068>`_, 2024. It solves rows by sketched
      preconditioners; a diagonal one and a warm start do here. No code was published.
    """
    if solver not in ("cholesky", "pcg"):
        raise ValueError(f"solver must be 'cholesky' or 'pcg', got {solver!r}")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank must be from 1 to {min(shape)}, got {rank}")
    check_nonnegative("ridge", ridge)
    check_positive("incoherence", incoherence)
    rows, columns, values = jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(values)
    if not rows.shape == columns.shape == values.shape or rows.ndim != 1:
        raise ValueError(
            f"rows, columns and values must be three vectors of one length, got {rows.shape}, "
            f"{columns.shape} and {values.shape}"
        )
    values = values.astype(jnp.result_type(values, jnp.float32))
    m, n = shape

    def half(fixed: jax.Array, at: jax.Array, owner: jax.Array, count: int, last: Any) -> Any:
        """Rows of one factor, from the rows of the other at the observed entries."""
        features = fixed[at]
        right = jnp.zeros((count, rank), values.dtype).at[owner].add(values[:, None] * features)
        if solver == "cholesky":
            gram = jnp.zeros((count, rank, rank), values.dtype)
            gram = gram.at[owner].add(features[:, :, None] * features[:, None, :])
            small = jnp.maximum(ridge * jnp.trace(gram, axis1=1, axis2=2) / rank, 1e-30)
            gram = gram + small[:, None, None] * jnp.eye(rank, dtype=values.dtype)
            return jnp.linalg.solve(gram, right[..., None])[..., 0]
        diagonal = jnp.zeros((count, rank), values.dtype).at[owner].add(features**2)
        mean = diagonal.mean(1, keepdims=True)
        small = jnp.maximum(ridge * mean, 1e-30)
        last = jnp.where(mean > 0, last, 0)  # what nothing is known of

        def product(v: jax.Array) -> jax.Array:
            along = jnp.sum(features * v[owner], 1)
            return small * v + jnp.zeros_like(v).at[owner].add(along[:, None] * features)

        return _pcg(product, right, diagonal + small, last, inner_steps)

    def sweep(carry: Any, _: Any) -> Any:
        left, right = carry
        # The same product in another basis: where the inexact solver starts.
        basis, mixing = jnp.linalg.qr(left)
        loose, mixing = jnp.linalg.qr(half(basis, rows, columns, n, right @ mixing.T))
        left = half(loose, columns, rows, m, basis @ mixing.T)
        error = jnp.sum(left[rows] * loose[columns], 1) - values
        return (left, loose), jnp.sum(error**2) / 2

    left = _start(key, rows, columns, values, shape, rank, incoherence)
    start = left, jnp.zeros((n, rank), values.dtype)
    (left, right), losses = jax.lax.scan(sweep, start, length=sweeps)
    return MatrixCompletion(left, right, losses)


def _start(
    key: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    values: jax.Array,
    shape: tuple[int, int],
    rank: int,
    incoherence: float,
) -> jax.Array:
    """Leading left singular vectors of the observed matrix, without rows that dominate them."""
    m, n = shape
    left = jnp.linalg.qr(jax.random.normal(key, (m, rank), values.dtype))[0]

    def power(_: Any, left: jax.Array) -> jax.Array:
        right = jnp.zeros((n, rank), values.dtype).at[columns].add(values[:, None] * left[rows])
        both = jnp.zeros((m, rank), values.dtype).at[rows].add(values[:, None] * right[columns])
        return jnp.linalg.qr(both)[0]

    left = jax.lax.fori_loop(0, 10, power, left)
    longest = 2 * incoherence * (rank / m) ** 0.5
    short = jnp.linalg.norm(left, axis=1, keepdims=True) <= longest
    return jnp.linalg.qr(jnp.where(short, left, 0))[0]


def _pcg(
    product: Any, right: jax.Array, diagonal: jax.Array, x: jax.Array, steps: int
) -> jax.Array:
    """Conjugate gradients for all rows at once, each with its own step sizes."""

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)[:, None]

    def step(_: Any, carry: Any) -> Any:
        x, r, p, rz = carry
        product_p = product(p)
        size = ratio(rz, jnp.sum(p * product_p, 1))
        x, r = x + size * p, r - size * product_p
        z = r / diagonal
        then = jnp.sum(r * z, 1)
        return x, r, z + ratio(then, rz) * p, then

    r = right - product(x)
    z = r / diagonal
    return jax.lax.fori_loop(0, steps, step, (x, r, z, jnp.sum(r * z, 1)))[0]
