r"""Exact learning curves of linear models: what an optimizer must show, to the last digit.

A linear student learns a linear teacher from random data, and the error in the limit of many
weights and examples is an integral over the spectrum of the data. An optimizer that is linear in
the gradients enters by its residual polynomial :math:`p_t(\lambda)` alone: what is left after t
steps of an error in a direction of curvature :math:`\lambda`. NumPy, in float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "generalization_error",
    "gradient_descent",
    "gradient_flow",
    "linear_optimizer",
    "marchenko_pastur",
    "optimal_ridge_error",
    "training_error",
]

Array = NDArray[np.floating[Any]]
Residual = Callable[[Array], Array]  # eigenvalues (n,) -> what is left (*times, n)


def marchenko_pastur(alpha: float, points: int = 4000) -> tuple[Array, Array]:
    r"""Eigenvalues of :math:`XX^\top` for inputs of variance 1/N, as a quadrature rule.

    For N weights and P examples, :math:`\alpha = P/N`, as N grows:

    .. math:: \rho(\lambda) = \frac{\sqrt{(\lambda_+-\lambda)(\lambda-\lambda_-)}}{2\pi\lambda}
        + \max(0, 1-\alpha)\,\delta(\lambda), \qquad \lambda_\pm = (\sqrt\alpha \pm 1)^2

    Args:
      alpha: examples per weight, above 0.
      points: nodes; the substitution :math:`\lambda = 1+\alpha+2\sqrt\alpha\cos\theta` makes
        the integrand smooth, so that 4000 are enough to rounding.

    Returns:
      `(eigenvalues, weights)`, each (points + 1,); the last is the atom at 0.

    Example:
      >>> eigenvalues, weights = marchenko_pastur(0.5)
      >>> print(f"{weights.sum():.6f} {weights @ eigenvalues:.6f} {weights[-1]}")
      1.000000 0.500000 0.5
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, examples per weight, got {alpha!r}")
    theta = (np.arange(points) + 0.5) * np.pi / points
    radius = 2 * np.sqrt(alpha)
    eigenvalues = 1 + alpha + radius * np.cos(theta)
    weights = np.square(radius * np.sin(theta)) / (2 * points * eigenvalues)
    return np.append(eigenvalues, 0.0), np.append(weights, max(0.0, 1 - alpha))


def generalization_error(
    residual: Residual, alpha: float, *, snr: float, inr: float = np.inf, points: int = 4000
) -> Array:
    r"""Expected squared error on new examples, the noise of their labels included.

    For the teacher :math:`y = \bar w\cdot x + \epsilon` with unit variance a weight, noise variance
    :math:`1/\mathrm{snr}`, and initial weights of variance :math:`1/\mathrm{inr}`,

    .. math:: E_g = \int\!\rho(\lambda)\Big[\Big(1+\frac{1}{\mathrm{inr}}\Big) p(\lambda)^2 +
        \frac{(1-p(\lambda))^2}{\mathrm{snr}\,\lambda}\Big] d\lambda + \frac{1}{\mathrm{snr}},

    the second term being 0 at :math:`\lambda = 0`.

    Args:
      residual: p, from `gradient_flow`, `gradient_descent`, `linear_optimizer`, or your own:
        eigenvalues (n,) to (\*times, n). The loss it descends is the sum over examples,
        :math:`\tfrac12\|y - wX\|^2`.
      alpha: examples per weight.
      snr: variance of a teacher weight over that of the noise; infinity without noise.
      inr: variance of a teacher weight over that of an initial one; infinity for a start at 0.
      points: of `marchenko_pastur`.

    Returns:
      (\*times,) float64.

    Example:
      >>> print(generalization_error(gradient_flow([0.0, 1e9]), 2.0, snr=4.0))
      [1.25 0.5 ]

    References:
      Advani and Saxe, `High-dimensional dynamics of generalization error in neural networks
      <https://arxiv.org/abs/1710.03667>`_, 2017.
    """
    eigenvalues, weights = marchenko_pastur(alpha, points)
    left = np.asarray(residual(eigenvalues), np.float64)
    inverse = np.divide(1, eigenvalues, out=np.zeros_like(eigenvalues), where=eigenvalues > 0)
    error = (1 + 1 / inr) * left**2 + (1 - left) ** 2 * inverse / snr
    return np.asarray(error @ weights + 1 / snr)


def training_error(
    residual: Residual, alpha: float, *, snr: float, inr: float = np.inf, points: int = 4000
) -> Array:
    r"""Expected squared error per training example.

    .. math:: E_t = \frac1\alpha \int_{\lambda>0}\!\rho(\lambda)\Big[\lambda
        \Big(1+\frac{1}{\mathrm{inr}}\Big) + \frac{1}{\mathrm{snr}}\Big] p(\lambda)^2 d\lambda +
        \max\Big(0, 1-\frac1\alpha\Big)\frac{1}{\mathrm{snr}}

    Args:
      residual, alpha, snr, inr, points: see `generalization_error`.

    Returns:
      (\*times,) float64.

    Example:
      >>> print(training_error(gradient_flow([0.0, 1e9]), 2.0, snr=4.0))
      [1.25  0.125]
    """
    eigenvalues, weights = marchenko_pastur(alpha, points)
    left = np.asarray(residual(eigenvalues), np.float64)
    scale = np.where(eigenvalues > 0, eigenvalues * (1 + 1 / inr) + 1 / snr, 0.0)
    return np.asarray((left**2 * scale) @ weights / alpha + max(0.0, 1 - 1 / alpha) / snr)


def optimal_ridge_error(alpha: float, *, snr: float, points: int = 4000) -> float:
    r"""Generalization error of the best ridge, :math:`\tfrac12\mathrm{snr}^{-1}\|w\|^2`.

    .. math:: \int\!\rho(\lambda)\frac{\gamma}{\lambda+\gamma}\,d\lambda + \gamma, \qquad
        \gamma = \frac{1}{\mathrm{snr}}

    Args:
      alpha: examples per weight.
      snr: see `generalization_error`; finite.
      points: of `marchenko_pastur`.

    Returns:
      A number: what early stopping is measured against.

    Example:
      >>> print(f"{optimal_ridge_error(1.0, snr=1.0):.4f}")
      1.6180
    """
    eigenvalues, weights = marchenko_pastur(alpha, points)
    return float(weights @ (1 / (1 + snr * eigenvalues)) + 1 / snr)


def gradient_flow(times: ArrayLike) -> Residual:
    r"""Residual of gradient flow, :math:`p = e^{-\lambda t}`.

    Args:
      times: t, in units of the loss that sums over examples.

    Returns:
      A residual of shape (\*times, n).

    Example:
      >>> print(gradient_flow(1.0)(np.array([0.0, 2.0])).round(3))
      [1.    0.135]
    """
    return lambda eigenvalues: np.exp(-np.multiply.outer(times, eigenvalues))


def gradient_descent(learning_rate: float, steps: ArrayLike) -> Residual:
    r"""Residual of gradient descent, :math:`p = (1-\eta\lambda)^k`; stable below 2/lambda.

    Args:
      learning_rate: :math:`\eta`.
      steps: k, one or several.

    Returns:
      A residual of shape (\*steps, n).

    Example:
      >>> print(gradient_descent(0.5, [1, 2])(np.array([1.0])))
      [[0.5 ]
       [0.25]]
    """
    return lambda eigenvalues: np.power(
        1 - learning_rate * eigenvalues, np.asarray(steps)[..., None]
    )


def linear_optimizer(optimizer: optax.GradientTransformation, steps: int) -> Residual:
    r"""Residual of an optimizer whose steps are linear in the gradients, measured by running it.

    One mode for each eigenvalue starts at 1 and descends :math:`\tfrac12\lambda w^2`. Momentum,
    Nesterov, dual averaging, schedules and weight decay are linear; Adam is not. Averages of the
    weights are averages of the residuals over the steps.

    Args:
      optimizer: any optax transformation.
      steps: how many.

    Returns:
      A residual of shape (steps + 1, n), of the iterates from the start on, in JAX's default
      precision.

    Example:
      >>> residual = linear_optimizer(optax.sgd(0.5), 2)
      >>> print(residual(np.array([0.0, 1.0]))[-1])
      [1.   0.25]
    """

    def residual(eigenvalues: Array) -> Array:
        curvature = jnp.asarray(eigenvalues, float)
        start = jnp.ones_like(curvature)

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            left, state = carry
            updates, state = optimizer.update(curvature * left, state, left)
            left = jnp.asarray(optax.apply_updates(left, updates))
            return (left, state), left

        _, path = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
        return np.asarray(jnp.concatenate([start[None], path]), np.float64)

    return residual
