"""The learning rate as a function of the batch size."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.trees.precision import as_updates, at_least_float32
from optax_structured.trees.tree_checks import check_same_tree

Rule = Literal["linear", "sqrt", "none"]


def scale_learning_rate(
    learning_rate: ScalarOrSchedule,
    base_batch: float,
    batch: Any,
    rule: Rule = "linear",
    *,
    critical_batch: float | None = None,
    dataset_size: float | None = None,
) -> Any:
    r"""The learning rate for another batch size: linear for SGD, square root for Adam.

    With :math:`B_e = B / (1 - B/N)`, as the noise is gone once a batch is the whole data set,

    .. math:: \frac{\eta'}{\eta} = \frac{1 + B_c/B_e}{1 + B_c/B_e'}

    or the root of it: proportional to the batch far below the critical batch :math:`B_c`, constant
    far above it. Keep momentum, and count warm-up in examples rather than steps.

    Args:
      learning_rate: :math:`\eta`, tuned at `base_batch`, a number or schedule.
      base_batch: B.
      batch: :math:`B'`, may be traced.
      rule: "linear" for SGD, "sqrt" for what divides by a root of curvature or second moments,
        "none" for no change.
      critical_batch: :math:`B_c`, at least 0, such as `fit_critical_batch` finds; None for no
        saturation.
      dataset_size: N, at least as large as the batches; None for a stream.

    Returns:
      The learning rate at `batch`, a schedule if it was given one.

    Raises:
      ValueError: an unknown rule, sizes that are not above 0 or above the data set.

    Equals the given learning rate at the base batch.

    Example:
      >>> import optax_structured as oxs
      >>> oxs.step_sizes.scale_learning_rate(0.1, base_batch=32, batch=128)
      0.4
      >>> oxs.step_sizes.scale_learning_rate(0.1, 32, 128, "sqrt")
      0.2
      >>> round(oxs.step_sizes.scale_learning_rate(0.1, 32, 1e9, critical_batch=96), 3)
      0.4

    References:
      Granziol, Zohren and Roberts, `Learning Rates as a Function of Batch Size
      <https://arxiv.org/abs/2006.09092>`_, JMLR 2022. The root of the saturating form is ours, and
      that the linear law holds below the critical batch is due to the Gauss-Newton part of the
      Hessian: additive noise alone gives a square root there for SGD too.
    """
    factor = _factor(base_batch, batch, rule, critical_batch, dataset_size)
    if callable(learning_rate):
        return lambda count: learning_rate(count) * factor
    return learning_rate * factor


def scale_by_batch_size(
    base_batch: float,
    rule: Rule = "linear",
    *,
    critical_batch: float | None = None,
    dataset_size: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates as `scale_learning_rate` does, by the batch size of each step.

    Args:
      base_batch: the batch size at which the learning rate was tuned.
      rule, critical_batch, dataset_size: see `scale_learning_rate`.

    Returns:
      An element without state whose update takes `batch_size=`, a number that may be traced.

    Raises:
      ValueError: as `scale_learning_rate`; an update without `batch_size`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> scaling = oxs.step_sizes.scale_by_batch_size(base_batch=32, rule="sqrt")
      >>> optimizer = optax.chain(optax.adam(1e-3), scaling)
      >>> w = jnp.zeros(1)
      >>> updates, _ = optimizer.update(jnp.ones(1), optimizer.init(w), w, batch_size=128)
      >>> print(updates.round(4))
      [-0.002]

    References:
      Granziol, Zohren and Roberts, `Learning Rates as a Function of Batch Size
      <https://arxiv.org/abs/2006.09092>`_, JMLR 2022.
    """
    _factor(base_batch, base_batch, rule, critical_batch, dataset_size)

    def update(
        updates: Any, state: Any, params: Any = None, *, batch_size: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        if batch_size is None:
            raise ValueError(
                "scale_by_batch_size needs the batch size of the step: call update(grads, state, "
                "params, batch_size=...)"
            )
        if params is not None:
            check_same_tree("scale_by_batch_size", updates, params, whose="the parameters")
        factor = jnp.asarray(_factor(base_batch, batch_size, rule, critical_batch, dataset_size))
        wide = jax.tree.map(at_least_float32, updates)
        scaled = jax.tree.map(lambda u: u * factor.astype(u.dtype), wide)
        return as_updates(scaled, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_decay(decay: float, base_batch: float, batch: float) -> float:
    r"""The decay of a moving average that spans as many examples at another batch size.

    .. math:: 1 - b' = (1 - b)\, B'/B

    The usual companion of the "sqrt" rule for the b1 and b2 of Adam; it is not in the paper.

    Args:
      decay: b in [0, 1), at the base batch.
      base_batch: B.
      batch: :math:`B'`, at most B / (1 - b).

    Returns:
      The decay at `batch`, in [0, 1).

    Raises:
      ValueError: a batch that spans more examples than the average did.

    Example:
      >>> import optax_structured as oxs
      >>> round(oxs.step_sizes.scale_decay(0.999, 32, 128), 6)
      0.996
    """
    scaled = 1 - (1 - decay) * batch / base_batch
    if not 0 <= scaled < 1:
        raise ValueError(
            f"a batch of {batch} holds more than the average with decay {decay} at batch "
            f"{base_batch} does: at most {base_batch / (1 - decay):g}"
        )
    return scaled


class CriticalBatch(NamedTuple):
    """What `fit_critical_batch` finds."""

    eigenvalue: float  # of the loss over all data: the limit of large batches
    critical_batch: float  # where noise adds as much again


def fit_critical_batch(eigenvalues: Sequence[float], batches: Sequence[float]) -> CriticalBatch:
    r"""Fits :math:`\lambda(B) = \lambda_1 (1 + B_c / B)` to top eigenvalues of minibatch Hessians.

    Args:
      eigenvalues: (n,), n at least 2, each a mean over a few batches of a size, as
        `curvature.hessian_density` or `curvature.stability_report` finds them.
      batches: (n,), the sizes, which differ.

    Returns:
      `CriticalBatch`; its critical batch is for `scale_learning_rate`.

    Raises:
      ValueError: fewer than two sizes, or eigenvalues that do not fall to a positive limit.

    Example:
      >>> import optax_structured as oxs
      >>> found = oxs.step_sizes.fit_critical_batch([6.0, 3.0], [16, 64])
      >>> print(f"{found.eigenvalue:.1f} {found.critical_batch:.1f}")
      2.0 32.0

    References:
      Granziol, Zohren and Roberts, `Learning Rates as a Function of Batch Size
      <https://arxiv.org/abs/2006.09092>`_, JMLR 2022.
    """
    inverse = 1 / np.asarray(batches, float)
    if len(set(inverse.tolist())) < 2:
        raise ValueError(f"fit_critical_batch needs two batch sizes at least, got {batches!r}")
    slope, limit = np.polyfit(inverse, np.asarray(eigenvalues, float), 1)
    if limit <= 0 or slope < 0:
        raise ValueError(
            f"the eigenvalues {eigenvalues!r} at {batches!r} do not fall to a limit above 0: "
            "average each over more batches, or take larger ones"
        )
    return CriticalBatch(float(limit), float(slope / limit))


def minibatch_eigenvalue(
    eigenvalue: float, noise: float, batch: float, dataset_size: float = math.inf
) -> float:
    r"""Top eigenvalue of a minibatch Hessian whose noise is a symmetric random matrix.

    .. math:: \lambda(B) = \lambda + \frac{P s^2}{B_e \lambda} \text{ if } \lambda > \rho,
        \qquad 2\rho \text{ otherwise}, \qquad \rho = \sqrt{P s^2 / B_e}

    Args:
      eigenvalue: :math:`\lambda`, of the loss over all data, at least 0.
      noise: :math:`P s^2`, number of parameters times the variance of an entry for one example.
      batch: B.
      dataset_size: N, with :math:`B_e = B/(1 - B/N)`.

    Returns:
      :math:`\lambda(B)`; :math:`2/\lambda(B)` is the largest stable rate of gradient descent.

    Example:
      >>> import optax_structured as oxs
      >>> oxs.step_sizes.minibatch_eigenvalue(5.0, noise=100.0, batch=10)
      7.0

    References:
      Granziol, Zohren and Roberts, `Learning Rates as a Function of Batch Size
      <https://arxiv.org/abs/2006.09092>`_, JMLR 2022.
    """
    spread = noise * (1 / batch - 1 / dataset_size)
    if eigenvalue > math.sqrt(spread):
        return eigenvalue + spread / eigenvalue
    return 2 * math.sqrt(spread)


def _factor(base: Any, batch: Any, rule: str, critical: Any, dataset: Any) -> Any:
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {get_args(Rule)}, got {rule!r}")
    most = math.inf if dataset is None else dataset
    for name, size in {"base_batch": base, "batch": batch}.items():
        if isinstance(size, int | float) and not 0 < size <= most:
            raise ValueError(f"{name} must be above 0 and at most {most:g}, got {size!r}")
    if critical is not None and critical < 0:
        raise ValueError(f"critical_batch must be at least 0, got {critical!r}")
    if rule == "none":
        return 1.0
    old, new = 1 / base - 1 / most, 1 / batch - 1 / most  # noise, in units of that of an example
    if critical is not None and math.isfinite(critical):
        old, new = 1 + critical * old, 1 + critical * new
    if isinstance(new, int | float) and new == 0:
        raise ValueError("a batch of the whole data set has no noise: give critical_batch too")
    ratio = old / new
    return ratio if rule == "linear" else ratio**0.5
