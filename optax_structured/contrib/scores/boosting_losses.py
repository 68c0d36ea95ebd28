"""Losses of gradient boosting: best constant, residual, Newton step."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from optax_structured.trees.checks import check_choice

Kind: TypeAlias = Literal["squared", "logistic", "softmax"]


class BoostingLoss(NamedTuple):
    """What boosting needs of a loss L of targets y and scores F, arrays of one shape (n, ...)."""

    start: Callable[[jax.Array], jax.Array]  # y -> (...): the best constant F
    residual: Callable[[jax.Array, jax.Array], jax.Array]  # y, F -> like F: what is fitted
    step: Callable[..., jax.Array]  # y, F, h -> (): Newton step along h
    value: Callable[[jax.Array, jax.Array], jax.Array]  # y, F -> (n,): the loss
    link: Callable[[jax.Array], jax.Array]  # F -> like F: what it predicts


def boosting_loss(kind: Kind) -> BoostingLoss:
    r"""Squared, logistic or softmax loss as pure functions.

    .. math::
        \text{squared:}\quad & L = (y-F)^2, \quad r = y - F, \quad \rho = 1 \\
        \text{logistic, } y = \pm1:\quad & L = \log(1+e^{-2yF}), \quad r = \frac{2y}{1+e^{2yF}},
            \quad \rho = \frac{\sum r h}{\sum h^2\,|r|(2-|r|)} \\
        \text{softmax, one-hot } y:\quad & L = -\textstyle\sum_k y_k \log p_k, \quad r = y - p,
            \quad \rho = \frac{\sum r h}{\sum h^2\,p(1-p)}

    Args:
      kind: `"squared"`, `"logistic"` or `"softmax"`.

    Returns:
      A `BoostingLoss`. One step serves all outputs; its denominator is at least
      :math:`10^{-6}\sum h^2`, for scores that are wrong and saturated.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> import jax.numpy as jnp
      >>> loss, y = boosting_loss("logistic"), jnp.array([1.0, 1.0, -1.0])
      >>> print(loss.residual(y, jnp.zeros(3)), f"{loss.start(y):.3f}")
      [ 1.  1. -1.] 0.347
    """
    check_choice("kind", kind, Kind)
    return {"squared": _SQUARED, "logistic": _LOGISTIC, "softmax": _SOFTMAX}[kind]


def _newton(slope: jax.Array, curvature: jax.Array, h: jax.Array) -> jax.Array:
    square = jnp.sum(h**2)
    bend = jnp.maximum(jnp.sum(h**2 * curvature), 1e-6 * square)
    return jnp.sum(slope * h) / jnp.where(square > 0, bend, 1)


def _logistic_residual(y: jax.Array, f: jax.Array) -> jax.Array:
    return 2 * y * jax.nn.sigmoid(-2 * y * f)


def _logistic_step(y: jax.Array, f: jax.Array, h: jax.Array) -> jax.Array:
    r = _logistic_residual(y, f)
    return _newton(r, jnp.abs(r) * (2 - jnp.abs(r)), h)


def _softmax_step(y: jax.Array, f: jax.Array, h: jax.Array) -> jax.Array:
    p = jax.nn.softmax(f)
    return _newton(y - p, p * (1 - p), h)


def _by_example(losses: jax.Array) -> jax.Array:
    return jnp.sum(losses.reshape(len(losses), -1), -1)


_SQUARED = BoostingLoss(
    start=lambda y: jnp.mean(y, 0),
    residual=lambda y, f: y - f,
    step=lambda y, f, h: jnp.ones((), h.dtype),
    value=lambda y, f: _by_example((y - f) ** 2),
    link=lambda f: f,
)
_LOGISTIC = BoostingLoss(
    # Finite where there is one class only.
    start=lambda y: jnp.arctanh(jnp.mean(y, 0) * (1 - jnp.finfo(y.dtype).eps)),
    residual=_logistic_residual,
    step=_logistic_step,
    value=lambda y, f: _by_example(jax.nn.softplus(-2 * y * f)),
    link=lambda f: jax.nn.sigmoid(2 * f),
)
_SOFTMAX = BoostingLoss(
    start=lambda y: jnp.zeros(y.shape[1:], y.dtype),
    residual=lambda y, f: y - jax.nn.softmax(f),
    step=_softmax_step,
    value=lambda y, f: -jnp.sum(y * jax.nn.log_softmax(f), -1),
    link=jax.nn.softmax,
)
