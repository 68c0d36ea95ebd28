"""Elements of proximal optimizers, to be chained in this order."""

from optax_structured.proximal.averaging import (
    DualAveragingState,
    MovingAverageState,
    dual_averaging,
    moving_average,
)
from optax_structured.proximal.fused import FusedExact
from optax_structured.proximal.preconditioners import (
    AdamPreconditionerState,
    AdaptivePreconditionerState,
    adam_preconditioner,
    adaptive_preconditioner,
)
from optax_structured.proximal.prox_point import PointState, prox_point, record_point
from optax_structured.proximal.prox_step import ProxStepState, prox_step
from optax_structured.proximal.restart import RestartState, restart_at
from optax_structured.proximal.solvers import Exact, ProximalGradient, Solver, WeightedALS
from optax_structured.proximal.subproblem import Subproblem
from optax_structured.proximal.target import TargetSparsity

__all__ = [
    "AdamPreconditionerState",
    "AdaptivePreconditionerState",
    "DualAveragingState",
    "Exact",
    "FusedExact",
    "MovingAverageState",
    "PointState",
    "ProxStepState",
    "ProximalGradient",
    "RestartState",
    "Solver",
    "Subproblem",
    "TargetSparsity",
    "WeightedALS",
    "adam_preconditioner",
    "adaptive_preconditioner",
    "dual_averaging",
    "moving_average",
    "prox_point",
    "prox_step",
    "record_point",
    "restart_at",
]
