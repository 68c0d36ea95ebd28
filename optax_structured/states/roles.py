"""What an array of an optimizer state is: a first moment, a second moment, a basis, a counter."""

import dataclasses
from typing import Annotated, TypeVar


@dataclasses.dataclass(frozen=True)
class Role:
    """What an array of a state holds, and so how it may be stored and moved to another basis.

    Args:
      name: how tables and messages call it.
      power: 1 for what is linear in gradients, 2 for what is quadratic; None cannot be moved.
      signed: whether entries may be negative.
      wide: why it keeps its precision; empty where codes of 8 bits will do.
    """

    name: str
    power: int | None = None
    signed: bool = True
    wide: str = ""


FIRST_MOMENT = Role("first_moment", power=1)  # an average of gradients
SECOND_MOMENT = Role("second_moment", power=2, signed=False)  # an average or a sum of squares
CURVATURE = Role("curvature", power=2)  # an average of diagonals of the Hessian
COUNTER = Role("counter", wide="counters, keys and scalars are exact")
BASIS = Role("basis", wide="bases have a codec of their own, LowRank(codec=...)")
CODES = Role("codes", wide="it is in codes already")
WIDE = Role("wide", wide="`fields` says so")


def wide(name: str, why: str, power: int | None = None, signed: bool = True) -> Role:
    """A role that keeps its precision, and why."""
    return Role(name, power, signed, why)


POINT = wide("point", "a point among the parameters, which rounding would move")
# Measured on a convex problem of 10,000 steps: 15 times the solution away in 8 bits, where the sum
# of squares beside it is within 0.2 %, because its largest entry, the scale of a block, is exact.
GRADIENT_SUM = wide("gradient_sum", "a sum of all gradients, in which 8 bits lose single ones", 1)
ESTIMATE = wide("estimate", "a gradient kept by corrections, which 8 bits would lose", 1)
PENDING = wide("pending", "gradients of a step to come, each of which is added once", 1)
ERROR = wide("error", "what earlier steps left out; rounded off, it would never come back")

FACTOR = wide(
    "factor", "few numbers, each of which is read by a whole row or leaf", 2, signed=False
)

T = TypeVar("T")

# Beside the fields of a state: `mu: FirstMoment[Any]  # like params`.
FirstMoment = Annotated[T, FIRST_MOMENT]
SecondMoment = Annotated[T, SECOND_MOMENT]
Bases = Annotated[T, BASIS]
Codes = Annotated[T, CODES]
Point = Annotated[T, POINT]
GradientSum = Annotated[T, GRADIENT_SUM]
Estimate = Annotated[T, ESTIMATE]
Pending = Annotated[T, PENDING]
ErrorBuffer = Annotated[T, ERROR]
Factor = Annotated[T, FACTOR]
