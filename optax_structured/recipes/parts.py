"""The ends of chains that several recipes share."""

import optax

from optax_structured.checks import check_fraction
from optax_structured.proximal.clock import ScalarOrSchedule
from optax_structured.proximal.prox_step import record_point


def averaged(
    momentum: ScalarOrSchedule, keep_point: bool
) -> tuple[optax.GradientTransformation, ...]:
    """Keeps the share `momentum` of the previous iterate."""
    check_fraction("momentum", momentum)
    return *recorded(keep_point), scale(complement(momentum))


def recorded(keep_point: bool) -> tuple[optax.GradientTransformation, ...]:
    """`record_point`, where it is asked for."""
    return (record_point(),) if keep_point else ()


def complement(scalar: ScalarOrSchedule) -> ScalarOrSchedule:
    """One minus a number or schedule."""
    if callable(scalar):
        return lambda count: 1 - scalar(count)
    return 1 - scalar


def scale(factor: ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies updates by a number or schedule."""
    return optax.scale_by_schedule(factor) if callable(factor) else optax.scale(factor)
