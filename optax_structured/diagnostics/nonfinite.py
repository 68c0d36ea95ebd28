"""How many steps met a gradient that is not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.transforms import SkipNonfiniteState


class Nonfinite(NamedTuple):
    """Steps that `skip_nonfinite` left out."""

    skipped: jax.Array  # () int32: of all steps so far
    in_a_row: jax.Array  # () int32: since the last step in which all gradients were finite


def nonfinite(state: Any) -> Nonfinite:
    """The steps so far whose gradients were not all finite, from an optimizer state.

    Args:
      state: of a recipe, or of a chain in `skip_nonfinite`, however deeply wrapped. Where there are
        several, as under `optax.partition`, the largest counts.

    Returns:
      A `Nonfinite`, safe under jit.

    Raises:
      ValueError: nothing in `state` counts them.

    >>> import optax, optax_structured as oxs
    >>> optimizer = oxs.prox_sgd(0.1)
    >>> params = jnp.ones(2)
    >>> state = optimizer.init(params)
    >>> for gradient in (1.0, jnp.inf, jnp.nan):
    ...     _, state = optimizer.update(gradient * params, state, params)
    >>> [int(x) for x in nonfinite(state)]
    [2, 2]
    """

    def counts(node: Any) -> bool:
        return isinstance(node, SkipNonfiniteState)

    found = [node for node in jax.tree.leaves(state, is_leaf=counts) if counts(node)]
    if not found:
        raise ValueError(
            "nothing in the state counts steps with gradients that are not finite: give the state "
            "of a recipe, or build the optimizer as skip_nonfinite(optimizer)"
        )
    skipped, in_a_row = ([getattr(s, field) for s in found] for field in Nonfinite._fields)
    return Nonfinite(*(jnp.max(jnp.stack(x), axis=0) for x in (skipped, in_a_row)))
