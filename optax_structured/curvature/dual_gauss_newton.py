"""The exact Gauss-Newton step of a minibatch, through the small matrix of its outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.curvature.products import output_kernel
from optax_structured.states.clock import Clock, ScalarOrSchedule, is_zero, new_clock, now, tick
from optax_structured.trees.checks import check_nonnegative, check_params
from optax_structured.trees.precision import as_updates, scalar_dtype
from optax_structured.trees.tree_checks import check_real, check_same_tree


class DualGaussNewtonState(NamedTuple):
    """State of `scale_by_dual_gauss_newton`."""

    clock: Clock  # steps since init, for schedules
    damping: jax.Array  # () float32 or wider: of the last step


def mean_square(outputs: jax.Array) -> jax.Array:
    """Half the squared norm of residuals, averaged over the examples in the first axis.

    Args:
      outputs: (n, ...), outputs minus targets.

    Returns:
      The loss, () .

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> print(oxs.curvature.mean_square(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      6.25
    """
    return jnp.sum(jnp.square(outputs)) / (2 * len(outputs))


def scale_by_dual_gauss_newton(
    damping: ScalarOrSchedule = 1e-4,
    *,
    adaptive: bool = False,
    loss: Callable[[jax.Array], jax.Array] = mean_square,
    chunk: int = 32,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the damped Gauss-Newton direction of the same batch.

    With the outputs z of the batch, n numbers, their Jacobian J and the Hessian H of the loss in
    the outputs,

    .. math:: d = (J^\top H J + \epsilon I)^{-1} J^\top \nabla_z \ell
        = J^\top (H J J^\top + \epsilon I)^{-1} \nabla_z \ell

    The second form solves n by n. Made for batches with far fewer outputs than parameters; each
    output costs two passes through the model. It solves the batch exactly and forgets all others,
    so keep learning rates of 0.1 to 0.5 for minibatches. For least squares over all data,
    optimistix has Gauss-Newton and Levenberg-Marquardt solvers.

    Args:
      damping: :math:`\epsilon` at least 0, in the unit of :math:`J^\top H J`, a number or schedule;
        1e-6 to 1e-2 of its mean eigenvalue. The number 0 is the pseudo-inverse.
      adaptive: multiply the damping by the smallest eigenvalue of
        :math:`H^{1/2} J J^\top H^{1/2}`.
      loss: of the outputs, () , convex and independent of the parameters.
      chunk: rows of the Jacobian at a time, each a copy of the parameters.

    Returns:
      An element whose update takes `params` and `residual_fn=`, a function of parameters to outputs
      of shape (n, ...), or of parameters and `batch=` where that is given too. It ignores the
      gradients that flow in. Its state is `DualGaussNewtonState`.

    Raises:
      ValueError: a damping below 0; an update without `params` or `residual_fn`.

    Equals, for large damping, the gradient divided by it. A linear model with fewer examples than
    parameters is solved in one step of length 1 without damping.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structured as oxs
      >>> X, y = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 5.0]]), jnp.array([1.0, -1.0])
      >>> residual = lambda w: X @ w - y
      >>> optimizer = optax.chain(
      ...     oxs.curvature.scale_by_dual_gauss_newton(0.0), optax.scale(-1.0)
      ... )
      >>> w = jnp.zeros(3)
      >>> grad = jax.grad(lambda w: oxs.curvature.mean_square(residual(w)))(w)
      >>> updates, _ = optimizer.update(grad, optimizer.init(w), w, residual_fn=residual)
      >>> print(bool(jnp.max(jnp.abs(residual(w + updates))) < 1e-5))
      True

    References:
      Arbel, Menegaux and Wolinski, `Rethinking Gauss-Newton for Learning Over-Parameterized Models
      <https://arxiv.org/abs/2302.02904>`_, NeurIPS 2023: faster than gradient descent, but features
      generalise only from small initial weights and with small steps.
    """
    check_nonnegative("damping", damping)

    def init(params: Any) -> DualGaussNewtonState:
        check_real("scale_by_dual_gauss_newton", params, splits=False)
        return DualGaussNewtonState(new_clock(), jnp.zeros((), scalar_dtype(params)))

    def update(
        updates: Any,
        state: DualGaussNewtonState,
        params: Any = None,
        *,
        residual_fn: Callable[..., jax.Array] | None = None,
        batch: Any = None,
        **_: Any,
    ) -> tuple[Any, DualGaussNewtonState]:
        check_params("scale_by_dual_gauss_newton", params)
        if residual_fn is None:
            raise ValueError(
                "scale_by_dual_gauss_newton needs the outputs of the batch, not only their "
                "gradient: call update(grads, state, params, residual_fn=lambda params: ...)"
            )
        check_same_tree("scale_by_dual_gauss_newton", updates, params, whose="the parameters")
        outputs: Callable[[Any], jax.Array] = residual_fn
        if batch is not None:
            outputs = lambda p: residual_fn(p, batch)  # noqa: E731
        z, backward = jax.vjp(outputs, params)
        kernel = output_kernel(outputs, params, chunk=chunk)
        epsilon = jnp.asarray(now(damping, state.clock), z.dtype)
        weights, epsilon = dual_solution(
            kernel, z, loss, epsilon, adaptive=adaptive, pseudo_inverse=is_zero(damping)
        )
        (direction,) = backward(weights.reshape(z.shape))
        new = DualGaussNewtonState(tick(state.clock), epsilon.astype(state.damping.dtype))
        return as_updates(direction, updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def dual_solution(
    kernel: jax.Array,
    outputs: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    damping: jax.Array,
    *,
    adaptive: bool = False,
    pseudo_inverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The weights of the outputs' gradients in the Gauss-Newton direction.

    Args:
      kernel: (n, n), inner products of the gradients of all outputs.
      outputs: n numbers in any shape.
      loss: of the outputs, () .
      damping: () , above 0 unless `pseudo_inverse`.
      adaptive: multiply the damping by the smallest eigenvalue.
      pseudo_inverse: instead of damping.

    Returns:
      `(weights, damping)`, (n,) and () : what was used.

    Example:
      >>> import jax.numpy as jnp
      >>> half = lambda z: jnp.sum(z * z) / 2
      >>> weights, _ = dual_solution(jnp.eye(2), jnp.array([1.0, 2.0]), half, jnp.array(1.0))
      >>> print(weights)
      [0.5 1. ]
    """
    flat = jnp.ravel(outputs)
    whole: Callable[[jax.Array], jax.Array] = lambda z: loss(z.reshape(outputs.shape))  # noqa: E731
    slope, hessian = jax.grad(whole)(flat), jax.hessian(whole)(flat)
    if not adaptive and not pseudo_inverse:
        eye = jnp.eye(len(flat), dtype=kernel.dtype)
        return jnp.linalg.solve(hessian @ kernel + damping * eye, slope), damping
    values, vectors = jnp.linalg.eigh(hessian)
    roots = jnp.sqrt(jnp.maximum(values, 0))
    root = (vectors * roots) @ vectors.T
    symmetric = root @ kernel @ root
    if pseudo_inverse:
        inverse = jnp.where(roots > 0, 1 / jnp.where(roots > 0, roots, 1), 0)
        slope = (vectors * inverse) @ (vectors.T @ slope)
        return root @ (jnp.linalg.pinv(symmetric, hermitian=True) @ slope), damping
    damping = damping * jnp.maximum(jnp.linalg.eigvalsh(symmetric)[0], 0)
    eye = jnp.eye(len(flat), dtype=kernel.dtype)
    return jnp.linalg.solve(hessian @ kernel + damping * eye, slope), damping
