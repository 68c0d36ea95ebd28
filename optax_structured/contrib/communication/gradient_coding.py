"""Gradient codes: sums of gradients from any n - s of n workers."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Largest rounding error of a decoded sum, relative to its largest term, that is let through.
_TOLERATED = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class GradientCode:
    """What each of n workers sends, so that s of them need not be waited for.

    Built by `gradient_code`.

    Args:
      matrix: (n, n) float64: row i times the gradients of the chunks is what worker i sends; chunk
        j of the data goes to all workers i whose entry in column j is not 0.
      stragglers: s.
      repetition: whether groups of s + 1 workers send the same plain sum.

    >>> gradient_code(6, 2).load
    0.5
    """

    matrix: np.ndarray
    stragglers: int
    repetition: bool

    @property
    def workers(self) -> int:
        """n."""
        return len(self.matrix)

    @property
    def load(self) -> float:
        """The share of the data that a worker processes, (s + 1) / n."""
        return (self.stragglers + 1) / self.workers

    def encode(self, chunk_gradients: Any) -> Any:
        """What each worker sends: a tree with leaves (workers, ...) from one with (chunks, ...)."""
        return jax.tree.map(
            lambda g: jnp.tensordot(jnp.asarray(self.matrix, g.dtype), g, 1), chunk_gradients
        )

    def decoding(self, arrived: ArrayLike) -> jax.Array:
        """Weights of the workers, (n,), from the first n - s that have arrived, (n,) of bool.

        Raises:
          ValueError: too few of them; if `arrived` is traced, the weights are NaN.
        """
        arrived = jnp.asarray(arrived, bool)
        if self.repetition:
            groups = arrived.reshape(-1, self.stragglers + 1)
            first = groups & (jnp.cumsum(groups, 1) == 1)
            weights, enough = first.reshape(-1).astype(float), jnp.all(jnp.any(groups, 1))
        else:
            needed = self.workers - self.stragglers
            used = arrived & (jnp.cumsum(arrived) <= needed)
            rows = jnp.where(used[:, None], jnp.asarray(self.matrix, float), 0.0)
            weights = jnp.linalg.lstsq(rows.T, jnp.ones(self.workers))[0]
            weights, enough = jnp.where(used, weights, 0.0), jnp.sum(arrived) >= needed
        if not isinstance(enough, jax.core.Tracer) and not enough:
            raise ValueError(
                f"{int(jnp.sum(arrived))} of {self.workers} workers have arrived, which does not "
                f"determine the sum: a code for {self.stragglers} stragglers has to wait for more"
            )
        return jnp.where(enough, weights, jnp.nan)

    def decode(self, results: Any, arrived: ArrayLike) -> Any:
        """The sum over all chunks, a tree without the leading axis, from the workers in use."""
        weights = self.decoding(arrived)
        used = weights != 0

        def total(r: jax.Array) -> jax.Array:
            # What never arrived may hold anything, NaN included.
            r = jnp.where(used.reshape(-1, *(1,) * (r.ndim - 1)), r, 0)
            return jnp.tensordot(weights.astype(r.dtype), r, 1)

        return jax.tree.map(total, results)


def gradient_code(
    workers: int,
    stragglers: int,
    kind: Literal["repetition", "cyclic"] | None = None,
    *,
    constraints: ArrayLike | None = None,
    seed: int = 0,
) -> GradientCode:
    r"""A code for n workers of which any s may be missing.

    `"repetition"`: groups of s + 1 workers hold the same s + 1 chunks and send their sum; one of
    each group is enough. `"cyclic"`: worker i holds chunks i to i + s and sends a combination of
    them, row i of B, with :math:`H B^\top = 0` for a random H (s, n) whose rows sum to 0, so that
    the row of ones is a combination of any n - s rows of B.

    Args:
      workers: n.
      stragglers: s, from 0 (plain data parallelism) to n - 1.
      kind: None: repetition if s + 1 divides n, else cyclic.
      constraints: H of a cyclic code; None draws it.
      seed: of that draw.

    Returns:
      A `GradientCode`.

    Raises:
      ValueError: repetition where s + 1 does not divide n; a cyclic code that the precision of
        JAX (`jax.enable_x64`) cannot decode.

    Equals the plain sum for s = 0.

    Example:
      >>> import jax.numpy as jnp
      >>> code = gradient_code(4, 1)
      >>> sent = code.encode(jnp.array([1.0, 2.0, 3.0, 4.0]))
      >>> print(code.decode(sent, jnp.array([True, False, False, True])))
      10.0

    References:
      Tandon et al., `Gradient Coding <https://arxiv.org/abs/1612.03301>`_, 2017; Krishnan et al.,
      Sequential Gradient Coding for Straggler Mitigation, 2023. Neither says how ill-conditioned
      random cyclic codes are: 64 workers and 8 stragglers cost three digits, 256 and 15 all of
      float32.
    """
    n, s = workers, stragglers
    if not 0 <= s < n:
        raise ValueError(f"stragglers must be from 0 to workers - 1 = {n - 1}, got {s}")
    if kind is None:
        kind = "cyclic" if n % (s + 1) or constraints is not None else "repetition"
    if kind == "repetition":
        if n % (s + 1):
            raise ValueError(
                f"repetition needs groups of stragglers + 1 = {s + 1} workers, which do not divide "
                f"{n}: change one of them, or take kind='cyclic'"
            )
        return GradientCode(np.kron(np.eye(n // (s + 1)), np.ones((s + 1, s + 1))), s, True)
    if kind != "cyclic":
        raise ValueError(f"kind must be 'repetition', 'cyclic' or None, got {kind!r}")
    rng = np.random.default_rng(seed)
    if constraints is None:
        draw = rng.standard_normal((s, n - 1))
        constraints = np.c_[draw, -draw.sum(1)]
    code = GradientCode(_cyclic(np.asarray(constraints, np.float64), n), s, False)
    dtype = jnp.zeros(()).dtype
    error = float(jnp.finfo(dtype).eps) * _largest_weight(code.matrix, s, rng)
    if error > _TOLERATED:
        raise ValueError(
            f"a cyclic code of {n} workers and {s} stragglers loses too many digits in {dtype} "
            f"(relative error {error:.0e}); take kind='repetition', with stragglers + 1 a divisor "
            "of workers, or build, encode and decode it under jax.enable_x64"
        )
    return code


def _cyclic(constraints: np.ndarray, n: int) -> np.ndarray:
    s, matrix = len(constraints), np.eye(n)
    for i in range(n):
        held = (i + 1 + np.arange(s)) % n
        matrix[i, held] = -np.linalg.solve(constraints[:, held], constraints[:, i])
    return matrix


def _largest_weight(matrix: np.ndarray, s: int, rng: np.random.Generator) -> float:
    """Of decoding, over a sample of sets of stragglers."""
    n, largest = len(matrix), 1.0
    for missing in [np.arange(s), *(rng.permutation(n)[:s] for _ in range(16))]:
        rows = np.delete(matrix, missing, 0)
        weights = np.linalg.lstsq(rows.T, np.ones(n), rcond=None)[0]
        largest = max(largest, np.abs(weights).max())
    return largest
