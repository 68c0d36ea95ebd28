"""AnyLoss: accuracy, F-beta, G-mean and their kin as losses, from a soft confusion matrix."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.trees.checks import check_choice, check_nonnegative, check_positive
from optax_structured.trees.precision import at_least_float32

Metric: TypeAlias = Literal[
    "accuracy", "balanced_accuracy", "f_beta", "g_mean", "precision", "recall"
]


class Confusion(NamedTuple):
    """Counts of a confusion matrix, soft or exact; those of parts of a batch add up entrywise."""

    tp: jax.Array  # (*classes,) float32 or wider: true positives
    fp: jax.Array  # (*classes,): false positives
    fn: jax.Array  # (*classes,): false negatives
    tn: jax.Array  # (*classes,): true negatives


def soft_confusion(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    steepness: ArrayLike = 73.0,
    threshold: ArrayLike = 0.5,
    weights: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    axis_name: Any = None,
) -> Confusion:
    r"""Differentiable counts of true and false positives and negatives.

    Each probability p counts as a positive to the degree q, which is close to 0 or 1 except near
    the threshold c:

    .. math:: q_i = \frac{1}{1 + e^{-L(p_i - c)}}, \qquad \mathrm{TP} = \sum_i q_i y_i, \quad
        \mathrm{FP} = \sum_i q_i (1-y_i), \quad \mathrm{FN} = \sum_i (1-q_i) y_i, \quad
        \mathrm{TN} = \sum_i (1-q_i)(1-y_i)

    Args:
      probabilities: p in [0, 1], of any shape.
      labels: y, 0 or 1 (or in between), of the same shape.
      steepness: L > 0, a number. 73 is published for shallow models; 10 to 30 where gradients
        vanish, since :math:`dq/dp = Lq(1-q)` is small unless :math:`|p-c| < 4/L`.
      threshold: c, a number in (0, 1).
      weights: weight of each example, or a mask, broadcast to `labels`. Examples of weight 0 are
        left out even if they are NaN.
      axis: the axes of examples. The others are classes, counted by themselves.
      axis_name: mesh axes over which a batch is spread, under `jax.shard_map` or `jax.pmap`. The
        counts are those of the whole batch then; a mean of ratios by device would be another
        number.

    Returns:
      A `Confusion`, float32 or wider.

    Raises:
      ValueError: shapes that differ.

    Equals the exact counts as L goes to infinity, ties at the threshold counted half.

    Example:
      >>> import jax.numpy as jnp
      >>> counts = soft_confusion(jnp.array([0.9, 0.2, 0.6]), jnp.array([1, 0, 0]))
      >>> print(*(f"{float(x):.3f}" for x in counts))
      1.000 0.999 0.000 1.001
    """
    check_positive("steepness", steepness)
    p = at_least_float32(probabilities)
    y = jnp.asarray(labels, p.dtype)
    if p.shape != y.shape:
        raise ValueError(
            f"soft_confusion: probabilities of shape {p.shape} but labels of shape {y.shape}; "
            "labels are 0 or 1 for each probability (one_hot where there are classes)"
        )
    p = _unless_left_out(p, weights)
    q = jax.nn.sigmoid(steepness * (p - threshold))

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x if weights is None else x * jnp.asarray(weights, x.dtype), axis)

    counts = Confusion(
        tp=total(q * y), fp=total(q * (1 - y)), fn=total((1 - q) * y), tn=total((1 - q) * (1 - y))
    )
    return counts if axis_name is None else jax.lax.psum(counts, axis_name)


def confusion_metric(
    counts: Confusion, metric: Metric = "f_beta", *, beta: ArrayLike = 1.0, eps: ArrayLike = 1e-7
) -> jax.Array:
    r"""A metric of a confusion matrix: 1 is best.

    With :math:`n_1 = \mathrm{TP}+\mathrm{FN}` positives and :math:`n_0 = \mathrm{TN}+\mathrm{FP}`
    negatives,

    .. math::
        \text{accuracy} = \frac{\mathrm{TP}+\mathrm{TN}}{n_0+n_1}, \quad
        F_\beta = \frac{(1+\beta^2)\,\mathrm{TP}}{\beta^2 n_1 + \mathrm{TP}+\mathrm{FP}}, \quad
        \text{balanced accuracy} = \tfrac12\Big(\frac{\mathrm{TP}}{n_1} +
        \frac{\mathrm{TN}}{n_0}\Big),

    .. math::
        \text{G-mean} = \sqrt{\frac{\mathrm{TP}\,\mathrm{TN}}{n_1 n_0} + \epsilon^2},
        \quad \text{precision} = \frac{\mathrm{TP}}{\mathrm{TP}+\mathrm{FP}}, \quad
        \text{recall} = \frac{\mathrm{TP}}{n_1}

    Args:
      counts: a `Confusion`.
      metric: the name of one of these.
      beta: weight of recall against precision, at least 0; 0.5, 1 or 2.
      eps: least denominator, so that what has no examples counts as 0; bounds the slope of
        the root at 0.

    Returns:
      An array like the counts.

    Raises:
      ValueError: an unknown metric.

    Example:
      >>> import jax.numpy as jnp
      >>> counts = Confusion(*map(jnp.array, (6.0, 2.0, 2.0, 90.0)))
      >>> print(confusion_metric(counts, "f_beta"), confusion_metric(counts, "accuracy"))
      0.75 0.96
    """
    check_choice("metric", metric, Metric)
    check_nonnegative("beta", beta)
    check_positive("eps", eps)
    tp, fp, fn, tn = counts
    positives, negatives = tp + fn, tn + fp

    def share(part: jax.Array, whole: jax.Array) -> jax.Array:
        return part / jnp.maximum(whole, eps)

    if metric == "accuracy":
        return share(tp + tn, positives + negatives)
    if metric == "balanced_accuracy":
        return 0.5 * (share(tp, positives) + share(tn, negatives))
    if metric == "f_beta":
        square = jnp.square(jnp.asarray(beta, tp.dtype))
        return share((1 + square) * tp, square * positives + tp + fp)
    if metric == "g_mean":
        return jnp.sqrt(share(tp, positives) * share(tn, negatives) + eps**2)
    return share(tp, tp + fp) if metric == "precision" else share(tp, positives)


def confusion_metric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    metric: Metric = "f_beta",
    *,
    steepness: ArrayLike = 73.0,
    threshold: ArrayLike = 0.5,
    beta: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    axis_name: Any = None,
    eps: ArrayLike = 1e-7,
) -> jax.Array:
    r"""AnyLoss: one minus a metric of the soft confusion matrix of a whole batch.

    .. math:: \ell = 1 - \operatorname{mean}_{\text{classes}} \operatorname{metric}\big(
        \operatorname{soft\_confusion}(\sigma(z), y)\big)

    It is no mean over examples: batches should be as large as possible with a few positives each,
    and gradients of microbatches do not average to that of the batch. Add up the counts for that:
    `confusion_metric` of the sum of `Confusion`, all but one of them constant.

    Args:
      logits: z, of any shape.
      labels: y, 0 or 1, of the same shape.
      metric: see `confusion_metric`.
      steepness: L; see `soft_confusion`.
      threshold: the probability from which an example counts as positive.
      beta: of `"f_beta"`.
      weights: of the examples, or a mask; see `soft_confusion`.
      axis: the axes of examples; None: all. Over the others, the classes of a one-hot problem,
        the metric is averaged (macro average, one class against the rest).
      axis_name: mesh axes over which the batch is spread; see `soft_confusion`.
      eps: see `confusion_metric`.

    Returns:
      () float32 or wider, in [0, 1].

    Raises:
      ValueError: shapes that differ, or an unknown metric.

    Equals, for `"f_beta"` with beta 1, the soft Dice loss of q instead of p.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits, labels = jnp.array([0.1, -0.1, 0.05]), jnp.array([1.0, 0.0, 0.0])
      >>> print(f"{confusion_metric_loss(logits, labels, 'f_beta'):.3f}")
      0.365
      >>> print(*(f"{g:.2f}" for g in jax.grad(confusion_metric_loss)(logits, labels)))
      -1.10 0.51 0.87

    References:
      Han, Moniz and Chawla, `AnyLoss: Transforming Classification Metrics into Loss Functions
      <https://arxiv.org/abs/2405.14745>`_, 2024. The gradient of the G-mean in the authors' code
      is 4 times the derivative, and their Keras losses divide sums over a minibatch by the size of
      the training set; here n is that of the batch, and derivatives are those of the loss.
    """
    counts = soft_confusion(
        jax.nn.sigmoid(_unless_left_out(at_least_float32(logits), weights)),
        labels,
        steepness=steepness,
        threshold=threshold,
        weights=weights,
        axis=axis,
        axis_name=axis_name,
    )
    return 1 - jnp.mean(confusion_metric(counts, metric, beta=beta, eps=eps))


def _unless_left_out(x: jax.Array, weights: ArrayLike | None) -> jax.Array:
    """Zero for examples of weight 0: their NaN would reach the gradient as 0 times NaN."""
    return x if weights is None else jnp.where(jnp.asarray(weights) == 0, 0, x)
