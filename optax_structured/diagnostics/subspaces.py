"""What low-rank subspaces hold of the gradient, and how they move: pure functions, by leaf.

All take the state of an optimizer, however deeply wrapped, and the `low_rank` it was built with,
and return a dictionary from path to one number per matrix, (\\*batch,). Leaves whose basis is not a
stored matrix are in it only if `low_rank` names their projector.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.low_rank.residuals import NormScaled, Scaling
from optax_structured.low_rank.spec import LowRank
from optax_structured.low_rank.stored_basis import decoded
from optax_structured.low_rank.wrapper import DEFAULTS
from optax_structured.meshes.placement import product
from optax_structured.projectors import OneSided
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.products import project
from optax_structured.quantization.codec import is_encoded
from optax_structured.trees import as_rules, name_of_key, named_leaves, resolve
from optax_structured.trees.precision import at_least_float32


def captured_energy(state: Any, gradient: Any, low_rank: Any) -> dict[str, jax.Array]:
    r""":math:`\|P^\top G\|_F / \|G\|_F`: the share of the gradient that the subspace holds.

    Args:
      state: of an optimizer with a low-rank part.
      gradient: a tree like the parameters.
      low_rank: the `LowRank` or `rules` that the optimizer was built with.

    Returns:
      From path to (\*batch,), in [0, 1] for orthonormal bases; 0 for a gradient of zero.

    >>> import jax, jax.numpy as jnp, optax_structured as oxs
    >>> low_rank = oxs.LowRank(rank=2)
    >>> optimizer = oxs.galore(1e-2, low_rank)
    >>> params = {"kernel": jnp.zeros((6, 4))}
    >>> gradient = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
    >>> _, state = optimizer.update(gradient, optimizer.init(params))
    >>> captured_energy(state, gradient, low_rank)["kernel"].round(1)
    Array(0.8, dtype=float32)
    """
    energies = {}
    for name, frame, factors, leaf in _projected(state, gradient, low_rank):
        matrix = _scaled(frame, leaf)
        held = jnp.sqrt(_sum_squares(project(frame, factors, matrix)))
        whole = jnp.sqrt(_sum_squares(matrix))
        energies[name] = held / jnp.where(whole == 0, 1, whole)
    return energies


def effective_rank(state: Any, gradient: Any, low_rank: Any) -> dict[str, jax.Array]:
    r"""The participation ratio of the singular values of :math:`R = P^\top G`.

    .. math:: \frac{(\sum_i \sigma_i^2)^2}{\sum_i \sigma_i^4}

    between 1, one direction, and the rank, all of them equally strong. Far below the rank, a
    smaller one would do. Takes no decomposition.

    Args:
      state, gradient, low_rank: as in `captured_energy`.

    Returns:
      From path to (\*batch,); 0 for a gradient of zero.

    Example: see `captured_energy`.
    """
    ranks = {}
    for name, frame, factors, leaf in _projected(state, gradient, low_rank):
        low = project(frame, factors, _scaled(frame, leaf))
        gram = product(low, low, transpose_b=True)
        trace, squares = jnp.trace(gram, axis1=-2, axis2=-1), _sum_squares(gram)
        ranks[name] = trace**2 / jnp.where(squares == 0, 1, squares)
    return ranks


def subspace_overlap(old: Any, new: Any, low_rank: Any) -> dict[str, jax.Array]:
    r""":math:`\|P_{old}^\top P_{new}\|_F^2 / r`: the mean squared cosine of their angles.

    Args:
      old: state of an optimizer with a low-rank part.
      new: a later state, say after a refit.
      low_rank: the `LowRank` or `rules` that the optimizer was built with.

    Returns:
      From path to (\*batch,); 1 for the same subspace, about rank / size for unrelated ones.

    Example: see `captured_energy`.
    """
    before, after = (_parts(state, "bases") for state in (old, new))
    overlaps = {}
    for name, basis in after.items():
        if _is_matrix(basis):
            overlap = product(basis, before[name], transpose_b=True)
            overlaps[name] = _sum_squares(overlap) / overlap.shape[-1]
    return overlaps


def limiter_activity(old: Any, new: Any, low_rank: Any) -> dict[str, jax.Array]:
    """Whether the limiter of norm growth held a residual back in the step from `old` to `new`.

    Args:
      old: state of `fira`, `apollo` or another optimizer with `NormScaled` or `Scaling`.
      new: its state one step later.
      low_rank: the `LowRank` or `rules` that the optimizer was built with.

    Returns:
      From path to bool, (\\*batch,); nothing for leaves without a limiter.

    Example: see `captured_energy`.
    """
    growth = _growth(low_rank)
    before, after = (_parts(state, "residual") for state in (old, new))
    active = {}
    for name, norm in after.items():
        if isinstance(norm, jax.Array) and norm.shape == _parts(new, "refresh")[name].missing.shape:
            earlier = before[name]
            active[name] = (earlier > 0) & (norm >= growth * earlier * (1 - 1e-5))
    return active


def _parts(state: Any, field: str) -> dict[str, Any]:
    """One field of all low-rank states inside `state`, by the path of the leaf."""

    def is_low_rank(node: Any) -> bool:
        return hasattr(node, "bases") and isinstance(node.bases, dict)

    found: dict[str, Any] = {}
    for node in jax.tree.leaves(state, is_leaf=is_low_rank):
        if is_low_rank(node):
            leaves = getattr(node, field, {})
            found |= {name_of_key(key): leaf for key, leaf in leaves.items()}
    return found


def _projected(
    state: Any, gradient: Any, low_rank: Any
) -> Iterator[tuple[str, Frame, jax.Array, jax.Array]]:
    """Path, frame, rank-major factors and gradient of every leaf with a basis of one matrix."""
    bases = _parts(state, "bases")
    if not bases:
        raise ValueError("the state has no low-rank part: give the state of galore, fira, ...")
    specs = resolve(low_rank, gradient)
    for (name, leaf), spec in zip(named_leaves(gradient), specs, strict=True):
        if name not in bases or spec is None:
            continue
        in_codes = is_encoded(bases[name])
        known = spec.projector is not None or in_codes or _is_matrix(bases[name])
        whole = spec.completed(**DEFAULTS)
        if in_codes and whole.codec is None:
            raise ValueError(
                f"the basis of {name!r} is in codes: give the LowRank with its codec, for q_galore "
                "LowRank(..., codec=Affine(bits=4))"
            )
        if known and isinstance(whole.projector, OneSided):
            frame = whole.frame(leaf.shape)
            basis = decoded(whole, frame, bases[name])
            yield name, frame, whole.projector.factors(frame, basis), leaf


def _scaled(frame: Frame, leaf: jax.Array) -> jax.Array:
    """The matrices of a leaf, scaled so that no square leaves the range of float32."""
    matrix = at_least_float32(frame.axes.to_matrix(leaf))
    largest = jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True)
    return matrix / jnp.where(largest == 0, 1, largest)


def _sum_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), (-2, -1))


def _is_matrix(basis: Any) -> bool:
    return hasattr(basis, "dtype") and jnp.issubdtype(basis.dtype, jnp.floating) and basis.ndim >= 2


def _growth(low_rank: Any) -> float:
    """Of the limiter that `low_rank` asks for, or of the default one."""
    rules = [value.residual for value in as_rules(low_rank).values if isinstance(value, LowRank)]
    limited = [rule.growth for rule in rules if isinstance(rule, Scaling)]
    return min(limited, default=NormScaled().growth)
