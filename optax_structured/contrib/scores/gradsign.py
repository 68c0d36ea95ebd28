"""GradSign: do the gradients of single examples agree on a sign, before any training?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.trees import Rules, rules
from optax_structured.trees.precision import at_least_float32, scalar_dtype

_KERNELS = rules((r"(^|/)kernel$", True), default=False)


class GradSign(NamedTuple):
    """Score of a network, and what it is the sum of."""

    score: jax.Array  # (): sum over counted weights of |sum of signs|, at most examples * weights
    agreement: jax.Array  # () in [0, 1]: the score over its largest value
    sign_sums: Any  # like params, None where not counted: whole numbers, sums of signs


def gradsign(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    *,
    counted: Rules = _KERNELS,
    axis_name: Any = None,
) -> GradSign:
    r"""Agreement of the signs of single-example gradients at these parameters.

    .. math:: \sum_k \Big|\sum_{i=1}^n \operatorname{sign}
        \frac{\partial \ell_i}{\partial\theta_k}\Big|, \qquad \operatorname{sign} 0 = 0

    Higher is predicted to train better. It grows with the number of weights; compare networks of
    different size by `agreement`, which is not published. The score is of one initialisation:
    average over some, `jax.vmap` over parameters does.

    Args:
      loss: `loss(params, batch)`, () , called with batches of one example. Build the network in
        training mode there: batch normalisation then is over the positions of that example, as
        published.
      params: a randomly initialised network.
      batch: a tree of arrays (n, ...); n is 64 to 256.
      counted: `rules` to True for the weights that count; published: kernels of convolutions and
        linear layers, no biases and no normalisation.
      axis_name: mesh axes over which a batch is spread, under `jax.shard_map`. Sums of signs are
        added before their absolute values are taken.

    Returns:
      A `GradSign`. A weight whose gradient is NaN for an example counts nothing.

    Raises:
      ValueError: a pattern of `counted` that matches no parameter, or none that counts.

    Equals n times the number of nonzero gradients for n examples that are alike.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, batch):
      ...     return jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)
      >>> batch = {"x": jnp.eye(2)[jnp.array([0, 0, 1])], "y": jnp.array([1.0, -1.0, 1.0])}
      >>> found = gradsign(loss, {"kernel": jnp.zeros(2)}, batch)
      >>> print(found.score, found.sign_sums["kernel"], f"{found.agreement:.3f}")
      1.0 [ 0. -1.] 0.167

    References:
      Zhang and Jia, `GradSign: Model Performance Inference with Theoretical Insights
      <https://arxiv.org/abs/2110.08616>`_, 2022. The algorithm of the paper counts all parameters;
      its code, followed here, kernels only.
    """
    counts = counted.tree(params)
    if not any(jax.tree.leaves(counts)):
        raise ValueError("gradsign: `counted` counts no parameter; give it rules with a True")
    if axis_name is not None:
        # Each device takes gradients of its own examples, which must not be added before the sign.
        params = jax.tree.map(lambda p: jax.lax.pcast(p, axis_name, to="varying"), params)

    def add(sums: Any, example: Any) -> tuple[Any, None]:
        gradient = jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))
        signs = jax.tree.map(lambda g, count: jnp.sign(g) if count else None, gradient, counts)
        return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, signs), None

    # Floating point: whole numbers are exact up to 2^24 examples, and NaN stays NaN.
    start = jax.tree.map(
        lambda p, count: jnp.zeros_like(at_least_float32(p)) if count else None, params, counts
    )
    sums, _ = jax.lax.scan(add, start, batch)
    examples: Any = len(jax.tree.leaves(batch)[0])
    if axis_name is not None:
        sums, examples = jax.lax.psum((sums, examples), axis_name)
    leaves = jax.tree.leaves(sums)
    score = sum(jnp.nansum(jnp.abs(s), dtype=scalar_dtype(params)) for s in leaves)
    largest = examples * float(sum(np.size(s) for s in leaves))
    return GradSign(jnp.asarray(score), jnp.asarray(score / largest), sums)
