"""Each pair of factors as one matrix, whose columns are the ranks: they can die exactly."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured.adapters.lora import Pair, is_pair, map_pairs, with_factors


def stack_pairs(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Shows each pair to a transformation as one matrix, b above the transpose of a.

    .. math:: \begin{pmatrix} b \\ a^\top \end{pmatrix} \in
        \mathbb R^{(*\text{batch},\; \text{outputs} + \text{inputs},\; r)}

    A column is all there is of one rank. A penalty with groups along the last axis thus sets whole
    ranks to zero while it trains; they stay there, since their gradients vanish too, and `shrink`
    takes them out.

    After Adam, `prox_step` takes :math:`\eta \lambda` (learning rate times strength) off the root
    mean square of each rank at every step, while Adam moves its entries by about :math:`\eta` at
    most. So the strength is a share of a full step, independent of the scale of the loss, of the
    learning rate and of the size of the weight: begin with 0.05, or 0.2 in a run of a hundred
    steps; near 1 hardly a rank is left.

    The metric of `prox_adam` is zero where no gradient has been, and there any strength sets to
    zero: at the first step a shrinks to almost nothing, since b = 0, and below a head of zeros all
    ranks die. Let its strength be a schedule that begins with zeros.

    Args:
      inner: any transformation; it sees a dictionary of path and matrix for each `Pair`, and all
        other nodes as they are. Rules name the paths of the weights.

    Returns:
      A transformation with the state of `inner`.

    Equals `inner` where it acts on each entry alone.

    Example:
      >>> import optax, optax_structured as oxs
      >>> ranks = oxs.rules((r"head", None), default=oxs.GroupLasso(group_axis=-1))
      >>> penalty = oxs.prox_step(ranks, 0.05, weight=1e-3)
      >>> optimizer = oxs.adapters.stack_pairs(optax.chain(optax.adam(1e-3), penalty))
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(_stacked(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        known = None if params is None else _stacked(params)
        moved, state = inner.update(_stacked(updates), state, known, **extra)

        def back(pair: Pair, both: jax.Array) -> Pair:
            b, a = jnp.split(both, [pair.b.shape[-2]], axis=-2)
            return with_factors(pair, jnp.swapaxes(a, -1, -2), b)

        return map_pairs(back, updates, moved), state

    return optax.GradientTransformationExtraArgs(init, update)


def shrink(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter without the ranks of which both factors are exactly zero.

    Args:
      adapter: trained, concrete. Of stacked weights the ranks that are zero in all layers go.

    Returns:
      An adapter of the same merged weights and of smaller arrays; the optimizer starts again with
      `init`. A weight without any rank left keeps factors of rank 0.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> pair = oxs.adapters.Pair(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 0.0]]))
      >>> oxs.adapters.shrink({"kernel": pair})["kernel"].rank
      1
    """

    def smaller(pair: Pair) -> Pair:
        left = np.any(np.asarray(pair.b) != 0, axis=-2) | np.any(np.asarray(pair.a) != 0, axis=-1)
        kept = np.flatnonzero(left.reshape(-1, pair.rank).any(axis=0))
        return with_factors(pair, pair.a[..., kept, :], pair.b[..., kept])

    return {path: smaller(node) if is_pair(node) else node for path, node in adapter.items()}


def _stacked(tree: Any) -> Any:
    return map_pairs(
        lambda pair: jnp.concatenate([pair.b, jnp.swapaxes(pair.a, -1, -2)], axis=-2), tree
    )
