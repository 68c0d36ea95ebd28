"""LoRA-Pro: gradients of the factors whose effect on the weight is that of full fine-tuning."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structured.adapters.factor_gradients import Damped, FactorSolver, equivalent, svds_of
from optax_structured.adapters.lora import Pair, is_pair, map_pairs, with_factors
from optax_structured.trees import map_named
from optax_structured.trees.precision import at_least_float32


def lora_pro(
    solver: FactorSolver = Damped(),  # noqa: B008  (frozen)
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradients of two LoRA factors by those that move their product best.

    .. math:: \min_{dA, dB} \| s\,(b\, dA + dB\, a) - G \|_F^2

    where G, the gradient of the weight, enters only through :math:`g_A = s b^\top G` and
    :math:`g_B = s G a^\top`, which are what backpropagation gives.

    Args:
      solver: `Damped`, which we suggest, or `MinimumNorm` as published.

    Returns:
      An element without state that needs `params`, the adapter: to stand before Adam or SGD. Nodes
      that are not `Pair` pass through unchanged.

    Raises:
      ValueError: missing `params`.

    Equals plain LoRA, up to a factor, as the damping grows; full fine-tuning to first order where
    r is the smaller side, with SGD.

    Example:
      >>> import optax, optax_structured as oxs
      >>> optimizer = optax.chain(oxs.adapters.lora_pro(), optax.adam(1e-3))

    Reference: Wang et al., `LoRA-Pro <https://arxiv.org/abs/2407.18242>`_, 2025. Their code
    inverts Gram matrices, which loses digits in float32; here it is the SVDs of the factors. The
    damped form is ours.
    """

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        return adjusted(solver, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def lora_pro_full(
    inner: optax.GradientTransformation,
    solver: FactorSolver = Damped(),  # noqa: B008  (frozen)
) -> optax.GradientTransformationExtraArgs:
    r"""Runs any transformation on the gradient of the weight that the factors can see.

    .. math:: E = s\,(b\, dA + dB\, a), \qquad U = \operatorname{inner}(E), \qquad
        (dA', dB') = \operatorname{solve}(s b^\top U, s U a^\top)

    **The state of `inner` is as large as that of full fine-tuning**: two moments of the size of
    the weight for Adam. `optax.scale_by_factored_rms` keeps one row and one column of it.

    Args:
      inner: sees a dictionary of path and matrix (\*batch, inputs, outputs) for each `Pair`, as
        gradients E and as parameters :math:`s (b a)^\top`, so that its weight decay pulls towards
        the pretrained weight; all other nodes as they are. Its sign and learning rate carry over.
      solver: as in `lora_pro`; published `MinimumNorm()`.

    Returns:
      A transformation that needs `params`, the adapter. Its state is that of `inner`.

    Raises:
      ValueError: missing `params`.

    Equals projected full fine-tuning: :math:`E = P_b G + (I - P_b) G P_a` undamped.

    Example:
      >>> import optax, optax_structured as oxs
      >>> optimizer = oxs.adapters.lora_pro_full(optax.adam(1e-4))

    Reference: as for `lora_pro`; the published runs are `inner=optax.adam(...)` with
    `MinimumNorm()`, at the learning rate of full fine-tuning.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(map_pairs(lambda pair: jnp.swapaxes(pair.product(), -1, -2), params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        best = adjusted(solver, updates, params)
        seen = map_pairs(lambda p, g: jnp.swapaxes(equivalent(p, g.a, g.b), -1, -2), params, best)
        weights = map_pairs(lambda pair: jnp.swapaxes(pair.product(), -1, -2), params)
        moved, state = inner.update(seen, state, weights, **extra)

        def back(pair: Pair, u: jax.Array) -> Pair:
            u = jnp.swapaxes(u, -1, -2)
            a = pair.scale * jnp.swapaxes(pair.b, -1, -2) @ u
            b = pair.scale * u @ jnp.swapaxes(pair.a, -1, -2)
            return with_factors(pair, a, b)

        return adjusted(solver, map_pairs(back, params, moved), params), state

    return optax.GradientTransformationExtraArgs(init, update)


def adjusted(solver: FactorSolver, updates: Any, params: Any) -> Any:
    """The updates with each pair replaced by the one that the solver finds."""
    if params is None:
        raise ValueError("lora_pro needs params, the adapter: update(gradient, state, adapter)")
    pairs = [x for x in jax.tree.leaves(params, is_leaf=is_pair) if is_pair(x)]
    svds = iter(svds_of(pairs))

    def solved(pair: Pair, g: Pair) -> Pair:
        found = solver.solve(next(svds), pair.scale, at_least_float32(g.a), at_least_float32(g.b))
        return with_factors(g, found[0].astype(g.a.dtype), found[1].astype(g.b.dtype))

    return map_pairs(solved, params, updates)


def decayed(params: Any, adapter: Any, amount: Any) -> tuple[Any, Any]:
    r"""Weight decay of the adapted weights, :math:`W \leftarrow (1 - c) W`, for both parts of them.

    .. math:: W_0 \leftarrow (1 - c) W_0, \qquad a, b \leftarrow \sqrt{1 - c}\,(a, b)

    Args:
      params: the frozen parameters, which change: decay is off unless this is called.
      adapter: from `init`; only its `Pair` nodes decay.
      amount: c, learning rate times weight decay, in [0, 1); may be traced.

    Returns:
      The parameters and the adapter, to which the updates of this step are added: these are
      computed at the factors before decay.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.LoRA(rank=2))
      >>> params, adapter = oxs.adapters.decayed(params, adapter, 0.5)
      >>> float(params["kernel"][0, 0])
      0.5
    """
    root = jnp.sqrt(1 - amount)
    pairs = {path for path, node in adapter.items() if is_pair(node)}
    kept = map_named(lambda path, w: (1 - amount) * w if path in pairs else w, params)
    return kept, map_pairs(lambda pair: with_factors(pair, root * pair.a, root * pair.b), adapter)
