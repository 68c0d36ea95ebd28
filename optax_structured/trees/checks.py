"""Checks of hyperparameters: one sentence for each mistake, silent for tracers and schedules."""

import math
from typing import Any, get_args

import jax
import numpy as np


def _concrete(value: Any) -> float | None:
    """The number behind `value`, or None for a tracer or a schedule, which only a run can check."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return None
    if np.ndim(value) != 0:
        raise ValueError(f"expected a scalar, got an array of shape {np.shape(value)}")
    return float(value)


def _check(name: str, value: Any, holds: Any, expected: str) -> None:
    try:
        number = _concrete(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {expected} or a schedule, got {value!r}") from error
    if number is not None and (math.isnan(number) or not holds(number)):
        raise ValueError(f"{name} must be {expected} or a schedule, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number above zero (or traced, or a schedule)."""
    _check(name, value, lambda x: 0 < x < math.inf, "a finite number above 0")


def check_nonnegative(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number of at least zero (or traced)."""
    _check(name, value, lambda x: 0 <= x < math.inf, "a finite number of at least 0")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless `0 <= value < 1` (or `value` is traced, or a schedule)."""
    _check(name, value, lambda x: 0 <= x < 1, "in [0, 1)")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError unless `0 <= value <= 1` (or `value` is traced, or a schedule)."""
    _check(name, value, lambda x: 0 <= x <= 1, "in [0, 1]")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless `value` is one of the strings of a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def is_more_than_zero(value: Any) -> bool:
    """Whether a number is above zero, or a schedule is, at its start or after a million steps."""
    values = [value(t) for t in (0, 1_000_000)] if callable(value) else [value]
    return any(not isinstance(x, jax.core.Tracer) and float(x) > 0 for x in values)


def check_params(element: str, params: Any) -> None:
    """Raises ValueError if `element` was updated without the current parameters."""
    if params is None:
        raise ValueError(
            f"{element} needs the current parameters: call update(grads, state, params)"
        )
