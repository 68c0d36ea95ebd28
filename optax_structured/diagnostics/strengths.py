"""Strengths worth trying: the largest, and a path down from it."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.diagnostics.penalised import dual_norm
from optax_structured.regularizers.coupled import joined
from optax_structured.trees import named_leaves, resolve


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

    >>> import optax_structured as oxs
    >>> print(strength_max(jnp.array([0.5, -2.0]), oxs.L1()))
    2.0
    """
    norms = []
    paths, leaves = [path for path, _ in named_leaves(gradient)], jax.tree.leaves(gradient)
    for joint in joined(resolve(structure, gradient), [jnp.shape(leaf) for leaf in leaves]):
        spec = joint.regularizer
        if spec.penalizes:
            norm = dual_norm(spec, joint.matrix(leaves))
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

    >>> import optax_structured as oxs
    >>> print(strength_path(jnp.array([0.5, -2.0]), oxs.L1(), number=3, smallest=0.01).round(3))
    [2.   0.2  0.02]
    """
    return strength_max(gradient, structure) * jnp.geomspace(1.0, smallest, number)
