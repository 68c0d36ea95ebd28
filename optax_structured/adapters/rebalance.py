"""Rebalancing: the same product from factors of which one has equal singular values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.adapters.lora import Pair, map_pairs, with_factors
from optax_structured.trees.checks import check_positive
from optax_structured.trees.precision import at_least_float32


def rebalance_factors(f: jax.Array, g: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
    r"""Factors of the same product, the first with all singular values equal.

    .. math:: F = Q R, \qquad F' = \beta Q, \qquad G' = G R^\top / \beta, \qquad
        F' G'^\top = F G^\top, \qquad F'^\top F' = \beta^2 I

    Gradient descent on over-parameterised factors is slow along directions in which both are small.
    After this its rate depends on :math:`\beta` alone.

    Args:
      f: F, (\*batch, n1, k). Where k exceeds n1, the last k - n1 columns of both become zero.
      g: G, (\*batch, n2, k).
      beta: :math:`\beta`, above 0; 0.3 to 1 times the root of the largest singular value of the
        product.

    Returns:
      F' and G', of the shapes of F and G.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> f, g = jnp.array([[3.0], [4.0]]), jnp.array([[1.0], [2.0]])
      >>> new_f, new_g = oxs.adapters.rebalance_factors(f, g, 0.5)
      >>> bool(jnp.allclose(new_f @ new_g.T, f @ g.T)), float(jnp.linalg.norm(new_f).round(4))
      (True, 0.5)

    Reference: Xiong et al., `How Over-Parameterization Slows Down Gradient Descent in Matrix
    Sensing <https://arxiv.org/abs/2310.01769>`_, 2024, with an SVD; any orthonormal basis of the
    columns of F will do.
    """
    q, r = jnp.linalg.qr(at_least_float32(f))
    missing = f.shape[-1] - q.shape[-1]
    wide = [(0, 0)] * (f.ndim - 1) + [(0, missing)]
    new_f = jnp.pad(beta * q, wide)
    new_g = jnp.pad(at_least_float32(g) @ jnp.swapaxes(r, -1, -2) / beta, wide)
    return new_f.astype(f.dtype), new_g.astype(g.dtype)


class RebalanceState(NamedTuple):
    """State of `rebalance_once`."""

    step: jax.Array  # () int32: steps since init
    inner: Any  # state of the inner transformation; of pairs, zero after the rebalancing


def rebalance_once(
    inner: optax.GradientTransformation, beta: float, *, at: int
) -> optax.GradientTransformationExtraArgs:
    r"""Rebalances the factors of all pairs of an adapter at one step, and optimizes at all others.

    At that step the update of a `Pair` is what `rebalance_factors` makes of b and a, and its
    moments start again at zero, since coordinates have changed. All else goes on.

    Args:
      inner: any transformation.
      beta: as in `rebalance_factors`, above 0.
      at: the step, counted from 0; when the loss falls slowly or has fallen to a tenth.

    Returns:
      A transformation that needs `params`. Its state is `RebalanceState`.

    Raises:
      ValueError: a beta that is not above 0, a negative step, missing `params`.

    Equals `inner` before that step.

    Example:
      >>> import optax, optax_structured as oxs
      >>> optimizer = oxs.adapters.rebalance_once(optax.sgd(0.1), beta=0.5, at=100)

    Reference: as for `rebalance_factors`.
    """
    check_positive("beta", beta)
    if at < 0:
        raise ValueError(f"rebalance_once(at=...) is a step of at least 0, got {at!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> RebalanceState:
        return RebalanceState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Any, state: RebalanceState, params: Any = None, **extra: Any
    ) -> tuple[Any, RebalanceState]:
        if params is None:
            raise ValueError("rebalance_once needs params: update(gradient, state, adapter)")
        moved, inner_state = inner.update(updates, state.inner, params, **extra)
        due = state.step == at

        def rebalanced(pair: Pair, step: Pair) -> Pair:
            def new(pair: Pair) -> Pair:
                b, g = rebalance_factors(pair.b, jnp.swapaxes(pair.a, -1, -2), beta)
                return with_factors(step, jnp.swapaxes(g, -1, -2) - pair.a, b - pair.b)

            return jax.lax.cond(due, new, lambda _: step, pair)

        of_pairs = map_pairs(lambda pair: jax.tree.map(lambda _: True, pair), params)
        of_pairs = jax.tree.map(lambda x: x is True, of_pairs)
        inner_state = optax.tree_map_params(
            inner,
            lambda x, paired: jnp.where(due, jnp.zeros_like(x), x) if paired else x,
            inner_state,
            of_pairs,
        )
        return map_pairs(rebalanced, params, moved), RebalanceState(state.step + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
