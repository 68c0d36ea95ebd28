"""The ends of the chains of low-rank recipes: correction, weight decay and step size."""

from typing import Any

import optax

from optax_structured.states.clock import ScalarOrSchedule, is_zero
from optax_structured.transforms import bias_correction, uncorrected_adam
from optax_structured.transforms.nonfinite import unguarded
from optax_structured.trees.checks import check_nonnegative


def descent(
    learning_rate: ScalarOrSchedule, name: str = "learning_rate"
) -> optax.GradientTransformation:
    """Steps of this length against the direction."""
    check_nonnegative(name, learning_rate)
    return optax.scale_by_learning_rate(learning_rate)


def decoupled(weight_decay: ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW's decay, before the learning rate; a plain 0 needs no parameters."""
    check_nonnegative("weight_decay", weight_decay)
    decay = optax.add_decayed_weights(weight_decay)
    if is_zero(weight_decay):
        return optax.GradientTransformation(decay.init, lambda u, state, params=None: (u, state))
    return decay


def adam_or(
    inner: optax.GradientTransformation | None, b1: Any, b2: Any, eps: Any
) -> tuple[optax.GradientTransformation, tuple[optax.GradientTransformation, ...]]:
    """Adam without its correction of bias, and the correction; or what was given instead."""
    if inner is None:
        return uncorrected_adam(b1, b2, eps), (bias_correction(b1, b2),)
    defaults = {"b1": (b1, 0.9), "b2": (b2, 0.999), "eps": (eps, 1e-6)}
    given = [n for n, (v, default) in defaults.items() if type(v) is float and v != default]
    if given:
        raise ValueError(
            f"inner=... was given and also {', '.join(given)}, which belong to the Adam that it "
            "replaces; give them to the inner transformation"
        )
    return unguarded(inner), ()
