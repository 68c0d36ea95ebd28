"""Products with the inverse of a damped empirical Fisher matrix, from a window of gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

contract = functools.partial(jnp.einsum, precision="highest")


class EmpiricalFisher(NamedTuple):
    """The inverse of a damped empirical Fisher matrix: call it with vectors."""

    blocks: tuple[jax.Array, ...]  # (m, B) each: the gradients, coordinates cut into blocks
    factors: tuple[jax.Array, ...]  # (m, m) each: Cholesky factor of m damping I + G G^T
    damping: jax.Array  # ()
    like: Any  # one gradient, a tree

    def __call__(self, x: Any) -> Any:
        """The inverse times x, a tree like one gradient."""
        flat, unravel = ravel_pytree(x)
        parts = []
        for G, L, part in zip(self.blocks, self.factors, self._cut(flat), strict=True):
            solved = jax.scipy.linalg.cho_solve((L, True), contract("md,d->m", G, part))
            parts.append((part - contract("md,m->d", G, solved)) / self.damping)
        return unravel(jnp.concatenate(parts))

    def diagonal(self) -> Any:
        """The diagonal of the inverse, a tree like one gradient."""
        parts = []
        for G, L in zip(self.blocks, self.factors, strict=True):
            half = jax.scipy.linalg.solve_triangular(L, G, lower=True)
            parts.append((1 - jnp.sum(half * half, 0)) / self.damping)
        return ravel_pytree(self.like)[1](jnp.concatenate(parts))

    def pivots(self) -> jax.Array:
        r"""(blocks, m): :math:`m + g_i^\top F_{i-1}^{-1} g_i`, F of the gradients before i."""
        return jnp.stack([jnp.diag(L) ** 2 / self.damping for L in self.factors])

    def _cut(self, flat: jax.Array) -> list[jax.Array]:
        ends = [sum(b.shape[1] for b in self.blocks[: i + 1]) for i in range(len(self.blocks))]
        return jnp.split(flat, ends[:-1])


def empirical_fisher_ihvp(
    grads: Any, damping: float, *, block_size: int | None = None
) -> EmpiricalFisher:
    r"""The inverse of a damped empirical Fisher matrix, without forming it.

    .. math:: F = \lambda I + \tfrac1m G^\top G, \qquad
        F^{-1} x = \tfrac1\lambda\big(x - G^\top (m\lambda I + G G^\top)^{-1} G x\big)

    For saliencies in pruning, :math:`w_q^2 / (2 [F^{-1}]_{qq})`, and influence scores. The
    difference loses digits where :math:`\lambda \ll \|g\|^2`: use float64 then. For the newest
    gradient as x, `scale_by_mfac` has a form that does not.

    Args:
      grads: a tree of arrays (m, ...), one gradient per row.
      damping: :math:`\lambda > 0`.
      block_size: cut the coordinates, flattened in the order of the tree, into blocks of this many
        and ignore F between them; None for all of F.

    Returns:
      `EmpiricalFisher`: call it with a tree like one gradient; it has a method `diagonal`.

    Raises:
      ValueError: a damping or block size that is not above 0.

    Equals x / damping for gradients of 0.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> inverse = oxs.curvature.empirical_fisher_ihvp(jnp.array([[1.0, 0.0]]), damping=1.0)
      >>> print(inverse(jnp.ones(2)), inverse.diagonal())
      [0.5 1. ] [0.5 1. ]

    References:
      Frantar, Kurtic and Alistarh, `M-FAC <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021, whose
      recursion this equals.
    """
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping!r}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size!r}")
    G = jax.vmap(lambda tree: ravel_pytree(tree)[0])(grads)
    m, size = G.shape
    width = size if block_size is None else block_size
    blocks = tuple(G[:, start : start + width] for start in range(0, size, width))
    factors = tuple(window_factor(contract("ad,bd->ab", b, b), damping) for b in blocks)
    one = jax.tree.map(lambda g: g[0], grads)
    return EmpiricalFisher(blocks, factors, jnp.asarray(damping, G.dtype), one)


def window_factor(gram: jax.Array, damping: Any) -> jax.Array:
    """Lower Cholesky factor of m damping I + G G^T, for the (m, m) products of the gradients."""
    m = len(gram)
    return jnp.linalg.cholesky(gram + m * jnp.asarray(damping, gram.dtype) * jnp.eye(m))
