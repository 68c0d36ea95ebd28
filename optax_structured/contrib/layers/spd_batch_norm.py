"""Batch normalisation of symmetric positive definite matrices in the Bures-Wasserstein metric."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.contrib.layers.spectral import (
    bures_wasserstein_distance,
    bures_wasserstein_exp,
    bures_wasserstein_geodesic,
    bures_wasserstein_mean_step,
    spd_power,
    spectral_product,
)
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.trees.checks import check_nonnegative, check_positive, check_share
from optax_structured.trees.precision import at_least_float32


class SPDBatchNormParams(NamedTuple):
    """Parameters of `spd_batch_norm`; the two matrices move by `spd_descent`."""

    bias: jax.Array  # (d, d), positive definite: G, where the mean goes
    metric: jax.Array  # (d, d), positive definite: M, of the generalised metric
    scale: jax.Array  # (): s, where the dispersion goes


class SPDStatistics(NamedTuple):
    """Running statistics of `spd_batch_norm`."""

    mean: jax.Array  # (d, d): moves along a geodesic to the mean of each batch
    variance: jax.Array  # ()


def init_spd_batch_norm(
    size: int, dtype: Any = jnp.float32
) -> tuple[SPDBatchNormParams, SPDStatistics]:
    """Parameters and statistics at the identity.

    Args:
      size: d.
      dtype: float32 or float64.

    Returns:
      `SPDBatchNormParams` and `SPDStatistics`.

    Example:
      >>> params, statistics = init_spd_batch_norm(3)
      >>> print(params.bias.shape, statistics.variance)
      (3, 3) 1.0
    """
    eye, one = jnp.eye(size, dtype=dtype), jnp.ones((), dtype)
    return SPDBatchNormParams(eye, eye, one), SPDStatistics(eye, one)


def spd_batch_norm(
    params: SPDBatchNormParams,
    statistics: SPDStatistics,
    x: jax.Array,
    *,
    training: bool,
    power: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    variance_about: Literal["identity", "mean"] = "identity",
) -> tuple[jax.Array, SPDStatistics]:
    r"""Centres, scales and biases matrices along geodesics of the Bures-Wasserstein metric.

    With :math:`X_1 = M^{-1/2} X^\theta M^{-1/2}` and G likewise: :math:`X_1` goes to the tangent
    space at the batch mean B, which is transported to I; the logarithm there is multiplied by
    :math:`s / \sqrt{\text{variance} + \epsilon}`, transported to :math:`G_1`, and mapped back;
    then the metric and the power are undone.

    Args:
      params: from `init_spd_batch_norm`.
      statistics: likewise; used, and returned as they are, unless `training`.
      x: (..., d, d), positive definite; all matrices share their statistics.
      training: whether to use the statistics of this batch, which are constants to derivatives.
      power: :math:`\theta > 0`: 1, or 0.5 for the published recognition of skeletons.
      momentum: share of this batch in the running statistics.
      eps: added to the variance.
      variance_about: `"identity"`, as the published code, of matrices before they are centred;
        `"mean"`, about their mean, as the paper.

    Returns:
      Matrices like x, symmetric and positive definite, and statistics.

    Raises:
      ValueError: an argument out of its range; matrices of another size.

    Equals the identity where G is the batch mean, M = I, the power is 1 and s is
    :math:`\sqrt{\text{variance} + \epsilon}`, as long as no matrix is so far from the mean that
    the logarithm leaves its domain (an eigenvalue below -2 there is folded, as published).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> a = jax.random.normal(jax.random.key(0), (8, 3, 3))
      >>> x = 9 * (a @ a.transpose(0, 2, 1) + 0.5 * jnp.eye(3))
      >>> y, _ = spd_batch_norm(*init_spd_batch_norm(3), x, training=True)
      >>> print(bool(jnp.trace(x[0]) > 20), bool(jnp.abs(y.mean(0) - jnp.eye(3)).max() < 0.5))
      True True

    References:
      Wang et al., `Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry
      <https://arxiv.org/abs/2504.00660>`_, 2025. Its backward pass is wrong for equal eigenvalues
      (M at its own start) and for powers other than 1; derivatives here are exact.
    """
    check_positive("power", power)
    check_share("momentum", momentum)
    check_nonnegative("eps", eps)
    if variance_about not in ("identity", "mean"):
        raise ValueError(f"variance_about must be 'identity' or 'mean', got {variance_about!r}")
    x = at_least_float32(x)
    if x.ndim < 2 or x.shape[-2:] != params.bias.shape:
        raise ValueError(
            f"spd_batch_norm takes matrices (..., d, d) with the d of its parameters, "
            f"{params.bias.shape[-1]}, got {x.shape}"
        )
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    root, inverse_root = spd_power(params.metric, 0.5), spd_power(params.metric, -0.5)

    def to_identity_metric(a: jax.Array) -> jax.Array:
        return inverse_root @ _power(a, power) @ inverse_root

    points, bias = to_identity_metric(x), to_identity_metric(params.bias)
    if training:
        batch = jax.lax.stop_gradient(points).reshape(-1, *eye.shape)
        mean = bures_wasserstein_mean_step(batch)
        about = eye if variance_about == "identity" else mean
        variance = jnp.mean(bures_wasserstein_distance(batch, about)) / power**2
        statistics = SPDStatistics(
            bures_wasserstein_geodesic(statistics.mean, mean, momentum),
            (1 - momentum) * statistics.variance + momentum * variance,
        )
    else:
        mean, variance = statistics
    centred = _at_identity(mean, points)
    factor = params.scale / jnp.sqrt(variance + eps)
    scaled = eye + factor * (spd_power(centred @ centred, 0.5) - eye)
    logarithm = 2 * (spd_power(scaled @ scaled, 0.5) - eye)
    moved = bures_wasserstein_exp(bias, spectral_product("transport", bias, logarithm))
    return _power(root @ moved @ root, 1 / power), statistics


def _at_identity(mean: jax.Array, points: jax.Array) -> jax.Array:
    """I + V/2, with V the logarithm at the mean, transported to I; its square is the matrix."""
    root, inverse = spd_power(mean, 0.5), spd_power(mean, -0.5)
    cross = root @ spd_power(root @ points @ root, 0.5) @ inverse
    logarithm = cross + jnp.swapaxes(cross, -1, -2) - 2 * mean
    # sqrt(2 / (b_i + b_j)): the inverse of the transport from I, which is 2 (transport . lyapunov).
    back = 2 * spectral_product("transport", mean, spectral_product("lyapunov", mean, logarithm))
    return jnp.eye(mean.shape[-1], dtype=mean.dtype) + back / 2


def _power(a: jax.Array, exponent: float) -> jax.Array:
    """Also at exponent 1, where it symmetrises without a decomposition."""
    return (a + jnp.swapaxes(a, -1, -2)) / 2 if exponent == 1 else spd_power(a, exponent)


class SPDDescentState(NamedTuple):
    """State of `spd_descent`."""

    clock: Clock  # steps since init, for schedules


def spd_descent(learning_rate: ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Descent that keeps matrices symmetric positive definite, for parameters that are such.

    .. math:: P \leftarrow \operatorname{Exp}_P(-\eta\, P \operatorname{sym}(g) P)
        = (I - L) P (I - L), \qquad LP + PL = \eta\, P \operatorname{sym}(g) P

    Args:
      learning_rate: a number or schedule; published: 2.5e-3.

    Returns:
      An element, the last of its chain, for leaves (..., d, d); give others another optimizer by
      `optax.partition`. Its state is `SPDDescentState`.

    Raises:
      ValueError: an update without params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> p = jnp.diag(jnp.array([1.0, 2.0]))
      >>> optimizer = spd_descent(0.5)
      >>> updates, _ = optimizer.update(100 * jnp.eye(2), optimizer.init(p), p)
      >>> print(bool(jnp.all(jnp.linalg.eigvalsh(optax.apply_updates(p, updates)) > 0)))
      True
    """
    check_nonnegative("learning_rate", learning_rate)

    def init(params: Any) -> SPDDescentState:
        del params
        return SPDDescentState(new_clock())

    def update(updates: Any, state: SPDDescentState, params: Any = None) -> Any:
        if params is None:
            raise ValueError("spd_descent needs the parameters: update(updates, state, params)")
        rate = now(learning_rate, state.clock)

        def move(g: jax.Array, p: jax.Array) -> jax.Array:
            wide = at_least_float32(p)
            step = wide @ ((g + jnp.swapaxes(g, -1, -2)) / 2) @ wide
            return (bures_wasserstein_exp(wide, -rate * step) - wide).astype(g.dtype)

        return jax.tree.map(move, updates, params), SPDDescentState(tick(state.clock))

    return optax.GradientTransformation(init, update)
