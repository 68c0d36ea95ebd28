"""Averaging of iterates, and the arithmetic of schedules that it needs."""

from collections.abc import Callable
from typing import Any

import optax

from optax_structured.proximal.prox_point import record_point
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.trees.checks import check_fraction


def averaged(
    momentum: ScalarOrSchedule, keep_point: bool
) -> tuple[optax.GradientTransformation, ...]:
    """Keeps the share `momentum` of the previous iterate."""
    check_fraction("momentum", momentum)
    return *recorded(keep_point), scale(complement(momentum))


def recorded(keep_point: bool) -> tuple[optax.GradientTransformation, ...]:
    """`record_point`, if wanted."""
    return (record_point(),) if keep_point else ()


def combined(f: Callable[..., Any], *scalars: ScalarOrSchedule) -> Any:
    """`f` of numbers; a schedule where one of them is."""
    if not any(map(callable, scalars)):
        return f(*scalars)
    return lambda count: f(*(x(count) if callable(x) else x for x in scalars))


def complement(scalar: ScalarOrSchedule) -> ScalarOrSchedule:
    """One minus a number or schedule."""
    return combined(lambda x: 1 - x, scalar)


def scale(factor: ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies updates by a number or schedule."""
    return optax.scale_by_schedule(factor) if callable(factor) else optax.scale(factor)
