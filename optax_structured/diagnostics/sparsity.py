"""Shares of exact zeros: of entries, groups, entries in groups, singular values.

Pure functions of parameters (or of the prox point, `oxs.prox_point(state)`) and the structure (a
`Regularizer`, `rules` of them, or None). Zero means `== 0.0`. Safe under jit, where a network has
many small leaves also faster.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.diagnostics.penalised import regularised
from optax_structured.regularizers import NuclearNorm, Regularizer
from optax_structured.regularizers.base import piece_size


def unstructured_sparsity(w: Any) -> jax.Array:
    """Share of exactly zero entries among all entries of all leaves.

    Args:
      w: parameters, or the prox point.

    Returns:
      A number in [0, 1]; 0 for a tree without entries.

    >>> print(unstructured_sparsity({"kernel": jnp.array([[1.0, 2.0], [0.0, 0.0]])}))
    0.5
    """
    leaves = jax.tree.leaves(w)
    return _share([jnp.sum(leaf == 0.0) for leaf in leaves], [jnp.size(leaf) for leaf in leaves])


def structured_sparsity(w: Any, structure: Any) -> jax.Array:
    """Share of zero groups (of zero entries, for a penalty on entries) over regularised leaves.

    Args:
      w: parameters, or the prox point.
      structure: a regularizer, `rules` of them, or None. Leaves with a `NuclearNorm` are left out:
        see `low_rank_level`.

    Returns:
      A number in [0, 1]; 0 where nothing is regularised.

    >>> import optax_structured as oxs
    >>> kernel = jnp.array([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    >>> print(structured_sparsity({"kernel": kernel}, oxs.GroupLasso(group_axis=-2)))
    0.5
    """
    found = [spec.support(leaf) for leaf, spec in _grouped(w, structure)]
    return _share([jnp.sum(~alive) for alive in found], [alive.size for alive in found])


def weighted_sparsity(w: Any, structure: Any) -> jax.Array:
    r"""Share of the regularised entries that lie in zero groups: the published group sparsity.

    .. math:: 1 - \frac{\sum_{g: w_g \ne 0} n_g}{\sum_g n_g}

    Args:
      w: parameters, or the prox point.
      structure: as in `structured_sparsity`.

    Returns:
      A number in [0, 1]; 0 where nothing is regularised.

    >>> import optax_structured as oxs
    >>> params = {"a": jnp.zeros((1, 30)), "b": jnp.ones((1, 10))}
    >>> print(weighted_sparsity(params, oxs.GroupLasso(group_axis=-2)))
    0.75
    """
    dead, total = [], []
    for leaf, spec in _grouped(w, structure):
        support, size = spec.support(leaf), piece_size(spec, leaf.shape)
        dead.append(jnp.sum(~support).astype(float) * size)
        total.append(support.size * size)
    return _share(dead, total)


def low_rank_level(w: Any, structure: Any) -> jax.Array:
    """Share of zero singular values over the leaves that have a `NuclearNorm`.

    Args:
      w: parameters, or the prox point, as in published numbers. Singular values of a stored matrix
        are zero up to rounding: see `NuclearNorm.support`.
      structure: as in `structured_sparsity`.

    Returns:
      A number in [0, 1]; 0 where no leaf has a nuclear norm.

    >>> print(low_rank_level(jnp.diag(jnp.array([2.0, 1.0, 0.0, 0.0])), NuclearNorm()))
    0.5
    """
    pairs = [(x, s) for x, s in regularised(w, structure) if isinstance(s, NuclearNorm)]
    found = [spec.support(leaf) for leaf, spec in pairs]
    return _share([jnp.sum(~alive) for alive in found], [alive.size for alive in found])


def _grouped(w: Any, structure: Any) -> list[tuple[jax.Array, Regularizer]]:
    return [(x, s) for x, s in regularised(w, structure) if not isinstance(s, NuclearNorm)]


def _share(dead: list[jax.Array], total: list[int]) -> jax.Array:
    """What is dead of the total; 0 where there is nothing to count."""
    return sum(dead, jnp.zeros(())) / sum(total) if sum(total) else jnp.zeros(())
