"""What each penalty of a tree acts on, and how hard a gradient pulls at it."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.regularizers import Regularizer
from optax_structured.regularizers.base import Norm
from optax_structured.regularizers.coupled import joined
from optax_structured.trees import resolve


def regularised(w: Any, structure: Any) -> list[tuple[jax.Array, Regularizer]]:
    """What each penalty acts on: leaves, and those that share norms as one matrix."""
    leaves = jax.tree.leaves(w)
    found = joined(resolve(structure, w), [jnp.shape(leaf) for leaf in leaves])
    return [(joint.matrix(leaves), joint.regularizer) for joint in found]


def dual_norm(spec: Regularizer, gradient: jax.Array) -> jax.Array | None:
    """Of the direction of descent, which is what a one-sided penalty is asked about."""
    return spec.dual_norm(-gradient) if isinstance(spec, Norm) else None
