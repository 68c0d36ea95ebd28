"""Dynamical stability of SGD: the sharpness that a learning rate and batch size tolerate."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.curvature.products import Product, output_kernel
from optax_structured.trees.products import dot

Criterion = Literal["second_moment", "trace", "fro", "lambda_max"]


class StabilityReport(NamedTuple):
    """Sharpness of a Gauss-Newton matrix G, and what it means for a learning rate."""

    trace: jax.Array  # (): of G
    fro: jax.Array  # (): Frobenius norm of G
    lambda_max: jax.Array  # (): largest eigenvalue of G
    fourth: jax.Array  # (): mean over examples of |J_i J_i^T|^2, fourth powers of gradient norms
    alignment: jax.Array  # (): of gradient noise with G; NaN where residuals are 0
    batch_size: jax.Array  # (): of the SGD that is judged
    learning_rate: jax.Array  # (): likewise
    limit: jax.Array  # (): no learning rate above it is stable in mean square

    @property
    def ratio(self) -> jax.Array:
        """The learning rate over its limit: training at this point is unstable above 1."""
        return self.learning_rate / self.limit


def stability_report(
    outputs: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    learning_rate: float,
    batch_size: int,
    residuals: Any = None,
    hessian_root: Any = None,
    chunk: int = 32,
) -> StabilityReport:
    r"""Whether SGD at this learning rate and batch size can stay near these parameters.

    With :math:`J_i` the Jacobian of the outputs for example i and
    :math:`G = \frac1n \sum_i J_i^\top J_i`, linearised SGD with batches of B examples is unstable
    in mean square if

    .. math:: \eta \Big[\big(1-\tfrac1B\big) \|G\|_F^2
        + \tfrac1{Bn}\sum_i \|J_i J_i^\top\|_F^2\Big] > 2 \operatorname{tr} G

    which is the limit of the report: necessary for stability, not sufficient. For B = 1 and equal
    gradient norms it is :math:`\eta \operatorname{tr} G \le 2`; for large B it comes near the
    condition of gradient descent, :math:`\eta\lambda_{\max} \le 2`, which limits too.

    Args:
      outputs: `outputs(params, batch)`, an array (n,) or (n, outputs), in evaluation mode.
      params: a point near interpolation; elsewhere it says how sharp the model is.
      batch: a tree of arrays (n, ...); 256 examples or more stand for a data set.
      learning_rate: :math:`\eta` in use.
      batch_size: B in use.
      residuals: outputs minus targets, like the outputs, for `alignment`; None leaves it NaN.
      hessian_root: (n, outputs, outputs), a root of the Hessian of the loss in the outputs of each
        example: `softmax_root` for cross entropy, None for square losses.
      chunk: rows of the Jacobian at a time, each a copy of the parameters.

    Returns:
      A `StabilityReport`, exact for this batch: it takes two passes per output and the n outputs
      squared in memory.

    Raises:
      ValueError: outputs that are not one row per example.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> X = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> report = oxs.curvature.stability_report(
      ...     lambda w, X: X @ w, jnp.zeros(2), X, learning_rate=0.5, batch_size=1
      ... )
      >>> print(report.trace, report.lambda_max, f"{report.limit:.3f} {report.ratio:.2f}")
      2.5 2.0 0.588 0.85

    References:
      Wu and Su, `The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent
      <https://arxiv.org/abs/2305.17490>`_, ICML 2023. The limit is sharper than theirs, and follows
      from the same linearisation.
    """
    z = jax.eval_shape(outputs, params, batch)
    n = len(jax.tree.leaves(batch)[0])
    if not hasattr(z, "shape") or z.ndim not in (1, 2) or z.shape[0] != n:
        raise ValueError(f"outputs must be (n,) or (n, outputs) for n = {n} examples, got {z}")
    width = z.size // n

    def rows(p: Any) -> jax.Array:
        flat = outputs(p, batch).reshape(n, width)
        if hessian_root is not None:
            flat = jnp.einsum("nij,nj->ni", hessian_root, flat)
        return flat

    kernel = output_kernel(rows, params, chunk=chunk)
    blocks = kernel.reshape(n, width, n, width)
    own = jnp.einsum("iaib->iab", blocks)
    trace = jnp.trace(kernel) / n
    fro = jnp.linalg.norm(kernel) / n
    fourth = jnp.mean(jnp.sum(own**2, (1, 2)))
    alignment = jnp.full((), jnp.nan, kernel.dtype)
    if residuals is not None:
        alignment = _alignment(blocks, jnp.asarray(residuals, kernel.dtype).reshape(n, width), fro)
    report = StabilityReport(
        trace=trace,
        fro=fro,
        lambda_max=jnp.linalg.eigvalsh(kernel)[-1] / n,
        fourth=fourth,
        alignment=alignment,
        batch_size=jnp.asarray(batch_size, kernel.dtype),
        learning_rate=jnp.asarray(learning_rate, kernel.dtype),
        limit=jnp.zeros((), kernel.dtype),
    )
    criteria: tuple[Criterion, ...] = ("second_moment", "lambda_max")
    limits = [max_stable_learning_rate(report, criterion) for criterion in criteria]
    return report._replace(limit=jnp.minimum(*limits))


def max_stable_learning_rate(
    report: StabilityReport, criterion: Criterion = "second_moment"
) -> jax.Array:
    r"""The largest learning rate that a criterion allows.

    Args:
      report: of `stability_report`.
      criterion: "second_moment", the sharpest condition for SGD; "trace",
        :math:`2/\operatorname{tr} G`, for batches of one; "fro",
        :math:`\sqrt{B/\mu}\,/\,\|G\|_F` with the alignment :math:`\mu`; "lambda_max",
        :math:`2/\lambda_{\max}`, for gradient descent.

    Returns:
      The rate, () .

    Raises:
      ValueError: another criterion.

    Example: see `stability_report`.
    """
    if criterion == "trace":
        return 2 / report.trace
    if criterion == "lambda_max":
        return 2 / report.lambda_max
    if criterion == "fro":
        return jnp.sqrt(report.batch_size / report.alignment) / report.fro
    if criterion == "second_moment":
        share = 1 / report.batch_size
        return 2 * report.trace / ((1 - share) * report.fro**2 + share * report.fourth)
    raise ValueError(
        f"criterion must be second_moment, trace, fro or lambda_max, got {criterion!r}"
    )


def softmax_root(logits: jax.Array) -> jax.Array:
    r"""A root of the Hessian of cross entropy in the logits.

    .. math:: R = \operatorname{diag}(\sqrt p)\,(I - \mathbf 1 p^\top), \qquad
        R^\top R = \operatorname{diag}(p) - p p^\top

    Args:
      logits: (n, classes).

    Returns:
      (n, classes, classes), for `stability_report`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> root = oxs.curvature.softmax_root(jnp.zeros((1, 2)))
      >>> print(root[0].T @ root[0])
      [[ 0.24999999 -0.24999999]
       [-0.24999999  0.24999999]]
    """
    p = jax.nn.softmax(logits)
    return jnp.sqrt(p)[:, :, None] * (jnp.eye(p.shape[-1], dtype=p.dtype) - p[:, None, :])


def second_moment_radius(jacobian: jax.Array, learning_rate: float, batch_size: int) -> jax.Array:
    r"""Growth of the second moment of linearised SGD per step, exactly, for small problems.

    The spectral radius, on the span of the rows, of

    .. math:: T(M) = M - \eta(GM + MG) + \eta^2\Big[\big(1-\tfrac1B\big) GMG
        + \tfrac1{Bn}\sum_i (j_i^\top M j_i)\, j_i j_i^\top\Big]

    Args:
      jacobian: (n, p), rows :math:`j_i`; the rank r of it at most some 30, as :math:`r^4` numbers
        are held.
      learning_rate: :math:`\eta`.
      batch_size: B, drawn with replacement.

    Returns:
      The radius, () : SGD near this minimum is stable in mean square below 1.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> print(oxs.curvature.second_moment_radius(jnp.array([[1.0]]), 2.5, 1))
      2.25

    References:
      Wu and Su, `The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent
      <https://arxiv.org/abs/2305.17490>`_, ICML 2023.
    """
    n = len(jacobian)
    values, vectors = jnp.linalg.eigh(jacobian @ jacobian.T)
    rank = int(jnp.sum(values > values[-1] * n * jnp.finfo(values.dtype).eps))
    rows = vectors[:, -rank:] * jnp.sqrt(values[-rank:])  # the same rows in r coordinates
    G, eye, share = rows.T @ rows / n, jnp.eye(rank, dtype=rows.dtype), 1 / batch_size
    squares = jnp.einsum("ia,ib->iab", rows, rows).reshape(n, -1)
    drift = jnp.kron(G, eye) + jnp.kron(eye, G)
    noise = (1 - share) * jnp.kron(G, G) + share / n * squares.T @ squares
    step = jnp.eye(rank**2, dtype=rows.dtype) - learning_rate * drift + learning_rate**2 * noise
    return jnp.max(jnp.abs(jnp.linalg.eigvalsh(step)))


def hutchinson(
    product: Product, like: Any, key: jax.Array, probes: int = 16
) -> tuple[jax.Array, jax.Array]:
    r"""Trace and Frobenius norm of a symmetric map, from products with random signs.

    .. math:: \operatorname{tr} A = \mathbb E\, v^\top A v, \qquad
        \|A\|_F^2 = \mathbb E\, \|Av\|^2

    Args:
      product: the map, of trees like `like`; `ggn_vp` makes that of G for models whose kernel is
        too large for `stability_report`.
      like: a tree like the parameters.
      key: of the random signs.
      probes: 8 to 32; the error falls with their root.

    Returns:
      `(trace, fro)`, () each.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> trace, fro = oxs.curvature.hutchinson(lambda v: 2 * v, jnp.zeros(9), jax.random.key(0))
      >>> print(trace, fro)
      18.0 6.0
    """
    leaves, structure = jax.tree.flatten(like)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, len(leaves))
        signs = [
            jnp.zeros_like(x) + jax.random.rademacher(k, x.shape, x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ]
        v = jax.tree.unflatten(structure, signs)
        image = product(v)
        return dot(v, image), dot(image, image)

    trace, square = jax.lax.map(one, jax.random.split(key, probes))
    return jnp.mean(trace), jnp.sqrt(jnp.mean(square))


def _alignment(blocks: jax.Array, residuals: jax.Array, fro: jax.Array) -> jax.Array:
    """Tr(Sigma G) / (2 R |G|_F^2), for the covariance Sigma of the gradients of single examples."""
    n = len(residuals)
    # What the gradient of example i does to all outputs, (n, n, width).
    moved = jnp.einsum("jbia,ia->ijb", blocks, residuals)
    raw = jnp.sum(moved**2) / n**2
    mean = jnp.sum(jnp.square(jnp.mean(moved, 0))) / n
    risk = jnp.sum(residuals**2) / (2 * n)
    scale = 2 * risk * fro**2
    return jnp.where(scale > 0, (raw - mean) / jnp.where(scale > 0, scale, 1), jnp.nan)
