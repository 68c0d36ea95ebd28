"""Schedules inside elements: every scalar is a number or a function of the steps done so far."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

# The clock of every element is optax's own schedule state: `restart_at` keeps it, wherever it is.
from optax import ScalarOrSchedule
from optax import ScaleByScheduleState as Clock

__all__ = ["Clock", "ScalarOrSchedule", "is_zero", "new_clock", "now", "root_of_count", "tick"]


def new_clock() -> Clock:
    return Clock(count=jnp.zeros((), jnp.int32))


def tick(clock: Clock) -> Clock:
    return Clock(count=optax.safe_increment(clock.count))


def now(scalar: Any, clock: Clock) -> Any:
    """The value of a scalar or schedule at this step."""
    return scalar(clock.count) if callable(scalar) else scalar


def is_zero(scalar: Any) -> bool:
    """Whether a scalar is the number 0 for good: not a schedule, and nothing traced or injected."""
    return isinstance(scalar, int | float) and scalar == 0


def root_of_count(count: jax.Array, dtype: Any) -> jax.Array:
    """The square root of an integer count in `dtype` (of an int32 it would be float32)."""
    return jnp.sqrt(count.astype(dtype))
