r"""What training has left: sparsity, rank, objective, distance to stationarity.

Pure functions of parameters (or of the prox point, `oxs.prox_point(state)`), the structure (a
`Regularizer`, `rules` of them, or None) and, where needed, the gradient of the loss and the
strength. Zero means `== 0.0`. Safe under jit, where a network has many small leaves also faster.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.regularizers import L1, GroupLasso, NuclearNorm, Regularizer
from optax_structured.regularizers.base import Norm, piece_size
from optax_structured.regularizers.coupled import joined
from optax_structured.trees import named_leaves, resolve


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["alive", "strength_max"],
    meta_fields=["path", "shape", "regularizer", "pieces", "piece_size"],
)
@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One leaf of a network, as `layer_rows` sees it; a pytree whose names are static."""

    path: str
    shape: tuple[int, ...]
    regularizer: Regularizer | None  # None: a plain leaf, whose pieces are its entries
    pieces: int  # entries, groups or singular values
    piece_size: int  # entries that one piece stands for
    alive: jax.Array  # () int32: how many pieces are nonzero
    strength_max: jax.Array | None  # (): dual norm of the gradient of this leaf


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

    >>> kernel = jnp.array([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    >>> print(structured_sparsity({"kernel": kernel}, GroupLasso(group_axis=-2)))
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

    >>> params = {"a": jnp.zeros((1, 30)), "b": jnp.ones((1, 10))}
    >>> print(weighted_sparsity(params, GroupLasso(group_axis=-2)))
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
    pairs = [(x, s) for x, s in _regularised(w, structure) if isinstance(s, NuclearNorm)]
    found = [spec.support(leaf) for leaf, spec in pairs]
    return _share([jnp.sum(~alive) for alive in found], [alive.size for alive in found])


def objective(loss: Any, w: Any, structure: Any, strength: Any) -> jax.Array:
    r"""The regularised objective, :math:`F(w) + \lambda \sum \psi(w)`, from the loss at `w`.

    Args:
      loss: F(w), a scalar.
      w: parameters, or the prox point.
      structure: as in `structured_sparsity`.
      strength: lambda, a scalar.

    Returns:
      A scalar.

    >>> print(objective(3.0, jnp.array([1.0, -2.0]), L1(), 0.1))
    3.3
    """
    penalty = sum((spec.value(leaf) for leaf, spec in _regularised(w, structure)), jnp.zeros(()))
    return loss + strength * penalty


def strength_max(gradient: Any, structure: Any) -> jax.Array:
    r"""The smallest strength that keeps all regularised leaves at zero: their largest dual norm.

    That is so for the gradient of the loss where those leaves are zero, in a model that is linear
    in them. In a network of several layers it is not a threshold: where all layers are zero the
    gradient is zero too, so that zero stays at any strength, and at other weights a layer shrinks
    while its own dual norm (`layer_rows`) is below the strength,

    .. math:: \tfrac{d}{dt} \tfrac12 \|w\|^2 = -\langle w, G\rangle - \lambda\psi(w)
        \le (\|G\|_* - \lambda)\,\psi(w),

    and takes all others with it once it is gone. So training dies near the **smallest** dual norm
    of a layer, which is several times below this number, and lower still as gradients shrink. Use
    this as the upper end of `strength_path`, or let `oxs.TargetSparsity` find the strength.

    Args:
      gradient: of the loss.
      structure: as in `structured_sparsity`; leaves with a mere constraint do not count.

    Returns:
      A scalar; 0 where nothing is penalised.

    Raises:
      ValueError: a penalty without a dual norm, since what it sets to zero depends on the metric
        too (or, of `TotalVariation`, since constants cost nothing).

    >>> print(strength_max(jnp.array([0.5, -2.0]), L1()))
    2.0
    """
    norms = []
    paths, leaves = [path for path, _ in named_leaves(gradient)], jax.tree.leaves(gradient)
    for joint in joined(resolve(structure, gradient), [jnp.shape(leaf) for leaf in leaves]):
        spec = joint.regularizer
        if spec.penalizes:
            norm = _dual_norm(spec, joint.matrix(leaves))
            if norm is None:
                raise ValueError(
                    f"{paths[joint.places[0]]!r}: {spec} has no dual norm, so that no strength is "
                    "known to be its largest; let oxs.TargetSparsity find one, or try strengths by "
                    "factors of 10"
                )
            norms.append(norm)
    return jnp.max(jnp.stack(norms)) if norms else jnp.zeros(())


def strength_path(
    gradient: Any, structure: Any, number: int = 10, smallest: float = 1e-3
) -> jax.Array:
    """Strengths to try: in equal ratios from `strength_max` down to that share of it, `(number,)`.

    Each is a run of its own. A path that is warm started, each run from the weights of the one
    before, goes from the weak end on, `strength_path(...)[::-1]`: in a network what is zero stays.

    Args:
      gradient: of the loss, as for `strength_max`.
      structure: as in `structured_sparsity`.
      number: of strengths, at least 2.
      smallest: the last of them over the first, in (0, 1).

    Returns:
      The strengths, the largest first.

    >>> print(strength_path(jnp.array([0.5, -2.0]), L1(), number=3, smallest=0.01).round(3))
    [2.   0.2  0.02]
    """
    return strength_max(gradient, structure) * jnp.geomspace(1.0, smallest, number)


def stationarity(w: Any, gradient: Any, structure: Any, strength: Any) -> jax.Array:
    r"""Distance from 0 to the subdifferential of the objective, for norms that split into blocks.

    .. math:: \Big( \sum_{w_g \ne 0} \big\|G_g + \lambda\omega \tfrac{w_g}{\|w_g\|}\big\|^2
        + \sum_{w_g = 0} \max(0, \|G_g\| - \lambda\omega)^2 \Big)^{1/2}

    and the like for `L1` and `NuclearNorm`; a plain leaf adds the norm of its gradient.

    Args:
      w: parameters, or the prox point.
      gradient: of the loss at `w`, full or of a large batch: with noise the distance does not
        vanish.
      structure: as in `structured_sparsity`.
      strength: lambda, a scalar.

    Returns:
      A scalar; 0 exactly at stationary points.

    Raises:
      NotImplementedError: a regularizer other than `GroupLasso`, `L1`, `NuclearNorm`.

    >>> print(stationarity(jnp.array([0.0, 1.0]), jnp.array([0.3, -0.5]), L1(), 0.5))
    0.0
    """
    specs, leaves, slopes = resolve(structure, w), jax.tree.leaves(w), jax.tree.leaves(gradient)
    residuals = [slope for slope, spec in zip(slopes, specs, strict=True) if spec is None]
    for joint in joined(specs, [jnp.shape(leaf) for leaf in leaves]):
        at, slope = joint.matrix(leaves), joint.matrix(slopes)
        residuals.append(_residual(at, slope, joint.regularizer, strength))
    squares = [jnp.sum(jnp.square(x)) for x in residuals]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def supports(w: Any, structure: Any) -> dict[str, jax.Array]:
    """Which pieces of structure are nonzero, by the path of each regularised leaf.

    Args:
      w: parameters, or the prox point.
      structure: as in `structured_sparsity`.

    Returns:
      From path to an array of bool, one per entry, group or singular value.

    >>> supports({"kernel": jnp.array([1.0, 0.0])}, L1())
    {'kernel': Array([ True, False], dtype=bool)}
    """
    named = zip(named_leaves(w), resolve(structure, w), strict=True)
    return {path: spec.support(leaf) for (path, leaf), spec in named if spec is not None}


def layer_rows(w: Any, structure: Any, gradient: Any = None) -> list[LayerRow]:
    """One row per leaf: pieces of structure it has, how many are left, how hard it is held.

    Args:
      w: parameters, or the prox point.
      structure: as in `structured_sparsity`.
      gradient: of the loss; with it, rows of leaves whose penalty has one get `strength_max`, the
        dual norm of the gradient. At a stationary point it is at most the strength where a leaf is
        zero, and equal to it where something is left.

    Returns:
      Rows in the order of the leaves, plain ones too.

    >>> (row,) = layer_rows({"kernel": jnp.array([1.0, 0.0])}, L1())
    >>> print(row.path, row.pieces, row.alive)
    kernel 2 1
    """
    named = named_leaves(w)
    slopes = [None] * len(named) if gradient is None else jax.tree.leaves(gradient)
    rows = []
    for (path, leaf), spec, slope in zip(named, resolve(structure, w), slopes, strict=True):
        support = leaf != 0.0 if spec is None else spec.support(leaf)
        size = 1 if spec is None else piece_size(spec, leaf.shape)
        held = None if spec is None or slope is None else _dual_norm(spec, slope)
        alive = jnp.count_nonzero(support)
        rows.append(LayerRow(path, leaf.shape, spec, support.size, size, alive, held))
    return rows


def _dual_norm(spec: Regularizer, gradient: jax.Array) -> jax.Array | None:
    """Of the direction of descent, which is what a one-sided penalty is asked about."""
    return spec.dual_norm(-gradient) if isinstance(spec, Norm) else None


def _regularised(w: Any, structure: Any) -> list[tuple[jax.Array, Regularizer]]:
    """What each penalty acts on: leaves, and those that share norms as one matrix."""
    leaves = jax.tree.leaves(w)
    found = joined(resolve(structure, w), [jnp.shape(leaf) for leaf in leaves])
    return [(joint.matrix(leaves), joint.regularizer) for joint in found]


def _grouped(w: Any, structure: Any) -> list[tuple[jax.Array, Regularizer]]:
    return [(x, s) for x, s in _regularised(w, structure) if not isinstance(s, NuclearNorm)]


def _share(dead: list[jax.Array], total: list[int]) -> jax.Array:
    """What is dead of the total; 0 where there is nothing to count."""
    return sum(dead, jnp.zeros(())) / sum(total) if sum(total) else jnp.zeros(())


def _residual(w: jax.Array, gradient: jax.Array, spec: Regularizer, strength: Any) -> jax.Array:
    """The subgradient of least norm (for a nuclear norm: something of the same norm)."""
    if isinstance(spec, NuclearNorm):
        return _nuclear_residual(w, gradient, spec, strength)
    if not isinstance(spec, (GroupLasso, L1)):
        raise NotImplementedError(
            f"stationarity knows the subgradients of GroupLasso, L1 and NuclearNorm, not of {spec}"
        )
    alive = jnp.expand_dims(spec.support(w), spec.coupled_axes(w.ndim))
    smooth = gradient + strength * jax.grad(spec.value)(w)
    # In a zero block the subgradients fill the dual ball: what sticks out of it is a prox.
    return jnp.where(alive, smooth, spec.prox(-gradient, 1.0, strength))


def _nuclear_residual(
    w: jax.Array, gradient: jax.Array, spec: NuclearNorm, strength: Any
) -> jax.Array:
    u, _, vt = jnp.linalg.svd(spec.axes.to_matrix(w), full_matrices=False)
    alive = spec.support(w)
    u, vt = u * alive[..., None, :], vt * alive[..., :, None]
    g = spec.axes.to_matrix(gradient)
    normal = g - u @ (u.mT @ g)
    normal = normal - (normal @ vt.mT) @ vt
    tangent = g - normal + strength * (u @ vt)
    outside = jnp.maximum(jnp.linalg.svd(normal, compute_uv=False) - strength, 0.0)
    return jnp.concatenate([tangent.ravel(), outside.ravel()])
