"""Weight normalisation as an optimizer: rows split into a magnitude and a direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.roles import Factor, Point
from optax_structured.trees import Axes, Rules, map_named, resolve, state_key, state_keys
from optax_structured.trees.checks import check_params
from optax_structured.trees.precision import (
    as_stored,
    as_update,
    at_least_float32,
    finite,
    wide_dtype,
)
from optax_structured.trees.tree_checks import check_real, check_same_tree


class WeightNormalizedState(NamedTuple):
    """State of `weight_normalized`; dictionaries are by `trees.state_key` of the leaf."""

    direction: Any  # of the optimizer of the directions, on leaves like the parameters
    magnitude: Any  # of the optimizer of the magnitudes, on {key: (*batch, rows)}
    lengths: Factor[Any]  # {key: (*batch, rows)}: ||v|| of the classical form, else empty


def weight_normalized(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    where: Rules | Axes = Axes(),  # noqa: B008  (frozen)
    *,
    classical: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains the length and the direction of each row of a matrix by an optimizer of its own.

    With :math:`W = g\, v / \|v\|` row by row, :math:`u = v/\|v\|`, and the chain rule

    .. math::
        G_g &= \langle G, u\rangle, \qquad
            G_v = \tfrac{g}{\|v\|}\,(G - G_g\, u) \\
        W &\leftarrow (g + \Delta_g) \frac{v + \Delta_v}{\|v + \Delta_v\|}

    where :math:`\Delta_v` and :math:`\Delta_g` are the updates that the two optimizers make of
    :math:`G_v` and :math:`G_g`. Nothing is stored but their states: the rows are measured with
    :math:`\|v\| = g`, so v is W itself.

    Args:
      direction: a whole optimizer, learning rate included; sees :math:`G_v`, and the gradients of
        leaves that are not normalised, whose updates pass through unchanged.
      magnitude: likewise; sees one dictionary from path to the :math:`G_g` of that leaf.
      where: the leaves to normalise and which of their axes are rows (outputs) and columns
        (inputs): an `Axes` or `rules` of them and None. By default all with two axes or more, in
        the layout (outputs, inputs); for kernels (inputs, outputs) say `Axes(rows=-1, cols=-2)`.
      classical: keep :math:`\|v\|`, which grows with every step and so damps the later ones, as in
        weight normalisation of the model itself; costs a number per row.

    Returns:
      An optimizer that needs `params`; its state is `WeightNormalizedState`. Weight decay belongs
      inside: after it in a chain it would act on the lengths as well.

    Rows of zeros have no direction: they take the plain step :math:`\Delta_v`. In the gradients of
    normalised leaves, entries that are not finite count as zero.

    Equals, with SGD for both and `classical=True`, gradient descent on v and g.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.transforms.weight_normalized(optax.sgd(0.1), optax.sgd(0.0))
      >>> params = jnp.array([[3.0, 4.0]])
      >>> updates, _ = optimizer.update(jnp.ones((1, 2)), optimizer.init(params), params)
      >>> print(jnp.linalg.norm(params + updates).round(3))
      5.0

    References:
      Salimans and Kingma, `Weight Normalization <https://arxiv.org/abs/1602.07868>`_, 2016; Huang
      et al., `Gradient Weight-normalized Low-rank Projection
      <https://arxiv.org/abs/2412.19616>`_, AAAI 2025.
    """
    direction, magnitude = map(optax.with_extra_args_support, (direction, magnitude))

    def init(params: Any) -> WeightNormalizedState:
        check_real("weight_normalized", params)
        gains = {key: _norms(w) for key, (_, w) in _views(where, params).items()}
        lengths: Any = {}
        if classical:  # a leaf if there is nothing to normalise, as in `_begun`
            lengths = {key: jnp.copy(g) for key, g in gains.items()} if gains else jnp.zeros(())
        return WeightNormalizedState(direction.init(params), _begun(magnitude, gains), lengths)

    def update(
        updates: Any, state: WeightNormalizedState, params: Any = None, **extra: Any
    ) -> tuple[Any, WeightNormalizedState]:
        check_params("weight_normalized", params)
        views = _views(where, params)
        gains = {key: _norms(w) for key, (_, w) in views.items()}
        units = {key: _over(w, gains[key]) for key, (_, w) in views.items()}
        lengths = jax.tree.map(at_least_float32, state.lengths) if classical else gains
        along, grown = {}, {}

        def tangent(name: str, gradient: jax.Array) -> jax.Array:
            if (key := state_key(name)) not in views:
                return gradient
            axes, w = views[key]
            rows = finite(jnp.asarray(to_rows(axes, gradient), w.dtype))
            along[key] = jnp.sum(rows * units[key], axis=-1)
            across = rows - along[key][..., None] * units[key]
            across = _over(gains[key][..., None] * across, lengths[key])
            rows = jnp.where(gains[key][..., None] > 0, across, rows)
            return from_rows(axes, rows, gradient.shape)

        def join(name: str, move: jax.Array, gradient: Any, param: Any) -> jax.Array:
            if (key := state_key(name)) not in views:
                return move
            axes, w = views[key]
            delta = jnp.asarray(to_rows(axes, move), w.dtype)
            v = lengths[key][..., None] * units[key] + delta
            grown[key] = _norms(v)
            change = (gains[key] + changes[key])[..., None] * _over(v, grown[key]) - w
            change = jnp.where(gains[key][..., None] > 0, change, delta)
            return as_update(from_rows(axes, change, move.shape), gradient, param)

        tangents = map_named(tangent, updates)
        moves, directions = direction.update(tangents, state.direction, params, **extra)
        changes, magnitudes = _moved(magnitude, along, state.magnitude, gains, extra)
        updates = map_named(join, moves, updates, params)
        kept = grown if classical and gains else state.lengths
        kept = as_stored(kept, state.lengths)
        return updates, WeightNormalizedState(directions, magnitudes, kept)

    return optax.GradientTransformationExtraArgs(init, update)


class LookaheadState(NamedTuple):
    """State of `lookahead_weight_norm`; a dictionary is by `trees.state_key` of the leaf."""

    direction: Any  # of the optimizer of v
    magnitude: Any  # of the optimizer of g, on {key: (*batch, rows)}
    v: Point[Any]  # like params, float32 or wider: weights without the step of the magnitudes


def lookahead_weight_norm(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    where: Rules | Axes = Axes(),  # noqa: B008  (frozen)
) -> optax.GradientTransformationExtraArgs:
    r"""The released form of gradient weight normalisation, which forgets each magnitude step.

    Row by row, with :math:`\Delta_v` and :math:`\Delta_g` what the optimizers make of G and of
    :math:`\langle G, v\rangle / \|v\|`,

    .. math:: g = \|v\| + \Delta_g, \qquad v \leftarrow v + \Delta_v, \qquad
        W \leftarrow g\, v / \|v\|

    so v follows `direction` as if there were no normalisation, and the magnitude decides only at
    which W the next gradient is taken. For comparison with published runs; use `weight_normalized`.

    Args:
      direction: a whole optimizer, learning rate included; sees the gradients and v.
      magnitude: likewise; sees one dictionary, from path to rows.
      where: which axes are rows and columns, as in `weight_normalized`. Other leaves of two axes or
        more have their rows in the last but one; those of fewer are one row.

    Returns:
      An optimizer that needs `params`; its state is `LookaheadState`, a copy of the parameters
      included.

    Equals `direction` with a `magnitude` that does nothing, up to the length of each step.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.transforms.lookahead_weight_norm(optax.sgd(0.1), optax.sgd(0.1))
      >>> state = optimizer.init(jnp.ones((3, 2)))

    References: as `weight_normalized`.
    """
    direction, magnitude = map(optax.with_extra_args_support, (direction, magnitude))

    def init(params: Any) -> LookaheadState:
        check_real("lookahead_weight_norm", params)
        v = jax.tree.map(lambda p: jnp.array(at_least_float32(p), copy=True), params)
        gains = {key: _norms(w) for key, (_, w) in _views(where, v, every=True).items()}
        return LookaheadState(direction.init(params), _begun(magnitude, gains), v)

    def update(
        updates: Any, state: LookaheadState, params: Any = None, **extra: Any
    ) -> tuple[Any, LookaheadState]:
        check_params("lookahead_weight_norm", params)
        check_same_tree("lookahead_weight_norm", updates, state.v)
        views = _views(where, state.v, every=True)
        gains = {key: _norms(w) for key, (_, w) in views.items()}
        gradients = jax.tree.map(lambda g, v: jnp.asarray(g, wide_dtype(v)), updates, state.v)
        along = {
            key: jnp.sum(finite(to_rows(axes, g)) * _over(w, gains[key]), axis=-1)
            for g, (key, (axes, w)) in zip(jax.tree.leaves(gradients), views.items(), strict=True)
        }
        moves, directions = direction.update(updates, state.direction, state.v, **extra)
        changes, magnitudes = _moved(magnitude, along, state.magnitude, gains, extra)
        v = jax.tree.map(at_least_float32, state.v)
        v = jax.tree.map(lambda v, m: v + jnp.asarray(m, v.dtype), v, moves)

        def step(name: str, v: jax.Array, p: Any) -> jax.Array:
            key = state_key(name)
            axes, rows = views[key][0], to_rows(views[key][0], v)
            weight = (gains[key] + changes[key])[..., None] * _over(rows, _norms(rows))
            move = from_rows(axes, weight, v.shape) - jnp.asarray(p, v.dtype)
            return move.astype(jnp.result_type(p))

        updates = map_named(step, v, params)
        return updates, LookaheadState(directions, magnitudes, as_stored(v, state.v))

    return optax.GradientTransformationExtraArgs(init, update)


def _begun(magnitude: optax.GradientTransformation, gains: dict[str, jax.Array]) -> Any:
    """Its state; a leaf if there is nothing to normalise, as in what optax.tree.map_params asks."""
    return magnitude.init(gains) if gains else jnp.zeros(())


def _moved(
    magnitude: optax.GradientTransformationExtraArgs, along: Any, state: Any, gains: Any, extra: Any
) -> tuple[Any, Any]:
    return magnitude.update(along, state, gains, **extra) if gains else ({}, state)


def _views(where: Any, tree: Any, *, every: bool = False) -> dict[str, tuple[Any, jax.Array]]:
    """`{key: (axes, rows)}` of the leaves to normalise, float32 at least."""
    views, leaves = {}, jax.tree.leaves(tree)
    for key, leaf, axes in zip(state_keys(tree), leaves, resolve(where, tree), strict=True):
        if axes is None and every and jnp.ndim(leaf) >= 2:
            axes = Axes()
        if axes is not None or every:
            views[key] = axes, to_rows(axes, at_least_float32(leaf))
    return views


def to_rows(axes: Axes | None, x: jax.Array) -> jax.Array:
    """(\\*batch, rows, columns); without axes, one row."""
    return x.reshape(1, -1) if axes is None else axes.to_matrix(x)


def from_rows(axes: Axes | None, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_rows`."""
    return rows.reshape(shape) if axes is None else axes.from_matrix(rows, shape)


def _norms(rows: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1))


def _over(rows: jax.Array, lengths: jax.Array) -> jax.Array:
    """Rows divided by numbers; unchanged where the number is zero."""
    return rows / jnp.where(lengths > 0, lengths, 1)[..., None]
