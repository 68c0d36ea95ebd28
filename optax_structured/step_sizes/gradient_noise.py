"""Gradient noise, and the batch size that a test of it asks for (AdAdaGrad)."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from optax_structured.trees.precision import at_least_float32

Kind = Literal["norm", "inner", "augmented"]


class NoiseStats(NamedTuple):
    """Variances over a batch, with divisor batch - 1; None where not computed."""

    var: jax.Array  # (): of the gradients, summed over all parameters
    inner_var: jax.Array | None  # (): of their products with the mean gradient
    orth_var: jax.Array | None  # (): of their parts orthogonal to the mean, summed over parameters
    grad_sq: jax.Array  # (): squared norm of the mean gradient
    signal: jax.Array  # (): that without what noise adds to it on average, var / batch
    batch: jax.Array  # () : number of examples


def gradient_noise_stats(
    per_example_grads: Any,
    kind: Kind = "norm",
    *,
    axis_name: Any = None,
    per_leaf: bool = False,
) -> NoiseStats:
    r"""Noise of the gradients of single examples.

    With :math:`g_i` flattened over all leaves and :math:`\bar g` their mean,

    .. math:: V = \sum_j \operatorname{Var}_i g_{ij}, \qquad
        v = \operatorname{Var}_i \langle g_i, \bar g\rangle, \qquad
        u = \sum_j \operatorname{Var}_i \Big(g_i - \tfrac{\langle g_i, \bar g\rangle}
        {\|\bar g\|^2}\,\bar g\Big)_j

    and :math:`V = u + v/\|\bar g\|^2`. The batch divided by its signal-to-noise ratio,
    V / signal, is the gradient noise scale.

    Args:
      per_example_grads: a tree of arrays (b, ...), such as `curvature.per_example` gives.
      kind: what is computed: V, v, or all three.
      axis_name: mesh axes over which the examples are spread, under `jax.shard_map` or `vmap`.
      per_leaf: sum v and u of each leaf by itself, as the published code does; leaves out the
        covariances between leaves.

    Returns:
      `NoiseStats` of all examples, float32 or wider.

    Raises:
      ValueError: an unknown kind, or fewer than two examples.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> stats = oxs.step_sizes.gradient_noise_stats({"w": jnp.array([[1.0], [3.0]])})
      >>> print(stats.var, stats.grad_sq, stats.signal)
      2.0 4.0 3.0

    References:
      Lau, Liu and Kolar, `AdAdaGrad <https://arxiv.org/abs/2402.11215>`_, 2024; Byrd et al., 2012;
      Bollapragada, Byrd and Nocedal, 2018. The distributed orthogonality term of the code squares
      a sum where a sum of squares is meant.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
    leaves = [at_least_float32(g) for g in jax.tree.leaves(per_example_grads)]
    add = (lambda x: x) if axis_name is None else lambda x: jax.lax.psum(x, axis_name)
    batch = add(jnp.asarray(len(leaves[0]), jnp.float32).astype(leaves[0].dtype))
    if axis_name is None and len(leaves[0]) < 2:
        raise ValueError(f"a variance takes two examples at least, got {len(leaves[0])}")

    means = [add(jnp.sum(g, 0)) / batch for g in leaves]
    squares = [jnp.sum(m * m) for m in means]
    grad_sq = sum(squares[1:], squares[0])
    apart = [g - m for g, m in zip(leaves, means, strict=True)]
    var = add(sum((jnp.sum(a * a) for a in apart), jnp.zeros(()))) / (batch - 1)
    inner = orth = None
    if kind != "norm":
        # One entry per example: products of what deviates from the mean, with the mean.
        products = [jnp.tensordot(a, m, m.ndim) for a, m in zip(apart, means, strict=True)]
        if not per_leaf:
            whole = sum(products[1:], products[0])
            products, squares = [whole] * len(leaves), [grad_sq] * len(leaves)
        spread = [add(jnp.sum(p * p)) / (batch - 1) for p in products]
        inner = sum(spread[1:], spread[0]) if per_leaf else spread[0]
    if kind == "augmented":
        rest = jnp.zeros(())
        for a, m, p, square in zip(apart, means, products, squares, strict=True):
            share = p / jnp.where(square == 0, 1, square)
            rest += jnp.sum(jnp.square(a - share.reshape(-1, *[1] * m.ndim) * m))
        orth = add(rest) / (batch - 1)
    return NoiseStats(var, inner, orth, grad_sq, grad_sq - var / batch, batch)


def microbatch_noise_stats(
    microbatch_grads: Any, microbatch_size: int, *, axis_name: Any = None
) -> NoiseStats:
    r"""Noise of the gradients of single examples, from means over microbatches only.

    .. math:: V \approx m \sum_j \operatorname{Var}_w \bar g_{wj}

    unbiased, and what gradient accumulation gives for free. It also holds for networks with batch
    normalisation, whose examples have no gradients of their own.

    Args:
      microbatch_grads: a tree of arrays (M, ...), mean gradients of M microbatches, M at least 2.
      microbatch_size: m, examples in each.
      axis_name: mesh axes over which the microbatches are spread.

    Returns:
      `NoiseStats` of the M m examples, without `inner_var` and `orth_var`.

    Raises:
      ValueError: fewer than two microbatches, or a size below 1.

    Equals `gradient_noise_stats` for microbatches of one example.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> stats = oxs.step_sizes.microbatch_noise_stats(jnp.array([1.0, 3.0]), microbatch_size=8)
      >>> print(stats.var, stats.batch)
      16.0 16.0

    References:
      Lau, Liu and Kolar, `AdAdaGrad <https://arxiv.org/abs/2402.11215>`_, 2024, take single
      examples instead.
    """
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1, got {microbatch_size!r}")
    of_means = gradient_noise_stats(microbatch_grads, axis_name=axis_name)
    return of_means._replace(
        var=microbatch_size * of_means.var, batch=microbatch_size * of_means.batch
    )


def pooled_variance(variances: jax.Array, means: Any, size: int) -> jax.Array:
    r"""Variance of all examples, from that within each of M equal groups and their means.

    .. math:: \frac{(m-1) \sum_w V_w + m \sum_w \|\bar g_w - \bar g\|^2}{Mm - 1}

    Args:
      variances: (M,), :math:`V_w` with divisor m - 1, summed over parameters.
      means: a tree of arrays (M, ...): mean gradients of the groups.
      size: m, examples in each group.

    Returns:
      The variance with divisor Mm - 1, () .

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> means = jnp.array([0.0, 2.0])
      >>> print(f"{oxs.step_sizes.pooled_variance(jnp.zeros(2), means, size=2):.3f}")
      1.333

    References:
      The code of `AdAdaGrad <https://arxiv.org/abs/2402.11215>`_ adds a biased variance between
      groups to the mean of those within; this is exact.
    """
    groups = len(variances)
    between = sum(jnp.sum(jnp.square(m - jnp.mean(m, 0))) for m in jax.tree.leaves(means))
    return ((size - 1) * jnp.sum(variances) + size * between) / (groups * size - 1)


def suggest_batch(
    stats: NoiseStats,
    *,
    eta: float | None = None,
    theta: float | None = None,
    nu: float | None = None,
    current: Any = None,
    maximum: int = 2**30,
) -> jax.Array:
    r"""The batch size at which noise passes the tests that are given, never below the current.

    .. math:: b' = \max\Big(b, \Big\lceil \frac{V}{\eta^2\|\bar g\|^2}\Big\rceil,
        \Big\lceil \frac{v}{\theta^2\|\bar g\|^4}\Big\rceil,
        \Big\lceil \frac{u}{\nu^2\|\bar g\|^2}\Big\rceil\Big)

    `eta` alone is the norm test, `theta` the inner product test, `theta` and `nu` together the
    augmented inner product test. A test of few examples is noisy itself: start with 8 at least.

    Args:
      stats: of this step.
      eta: norm of the noise in units of that of the gradient, above 0; 0.1 to 0.5.
      theta: the same along the gradient.
      nu: the same orthogonal to it.
      current: b, the batch size now; that of `stats` by default.
      maximum: cap of the result, at most 2^30.

    Returns:
      int32, () . A gradient of zero with noise asks for the maximum, without noise for b. Take it
      from the next step on.

    Raises:
      ValueError: no test, or one whose variance was not computed.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> stats = oxs.step_sizes.gradient_noise_stats(jnp.array([1.0, 3.0, 2.0, 2.0]))
      >>> print(oxs.step_sizes.suggest_batch(stats, eta=0.1))
      17

    References:
      Lau, Liu and Kolar, `AdAdaGrad <https://arxiv.org/abs/2402.11215>`_, 2024.
    """
    tests = {
        "eta": (eta, stats.var, 1),
        "theta": (theta, stats.inner_var, 2),
        "nu": (nu, stats.orth_var, 1),
    }
    size = stats.batch if current is None else jnp.asarray(current, stats.var.dtype)
    if eta is None and theta is None and nu is None:
        raise ValueError("suggest_batch needs a test: give eta, theta, or theta and nu")
    for name, (level, variance, power) in tests.items():
        if level is None:
            continue
        if variance is None:
            kind = "inner" if name == "theta" else "augmented"
            raise ValueError(f"{name} needs a variance: gradient_noise_stats(..., kind={kind!r})")
        scale = level**2 * stats.grad_sq**power
        asked = jnp.where(variance > 0, variance / jnp.where(scale > 0, scale, 1), 0)
        asked = jnp.where((variance > 0) & (scale == 0), maximum, asked)
        size = jnp.maximum(size, jnp.ceil(asked))
    return jnp.minimum(size, min(maximum, 2**30)).astype(jnp.int32)
