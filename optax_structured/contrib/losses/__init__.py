"""Losses that are more than a mean over examples."""

from optax_structured.contrib.losses.alignment import hessian_alignment_penalty, rademacher
from optax_structured.contrib.losses.confusion import (
    Confusion,
    confusion_metric,
    confusion_metric_loss,
    soft_confusion,
)
from optax_structured.contrib.losses.linear_head import (
    SoftmaxHead,
    linear_head_alignment_penalty,
    softmax_head,
)

__all__ = [
    "Confusion",
    "SoftmaxHead",
    "confusion_metric",
    "confusion_metric_loss",
    "hessian_alignment_penalty",
    "linear_head_alignment_penalty",
    "rademacher",
    "soft_confusion",
    "softmax_head",
]
