"""The roles of the arrays in the states of optax and optax.contrib (0.2.8), by class and field."""

from collections.abc import Mapping
from types import MappingProxyType

from optax_structured.states.roles import (
    BASIS,
    CURVATURE,
    FACTOR,
    FIRST_MOMENT,
    GRADIENT_SUM,
    PENDING,
    POINT,
    SECOND_MOMENT,
    Role,
    wide,
)

Roles = Mapping[str, Role]

_ADAM = {"mu": FIRST_MOMENT, "nu": SECOND_MOMENT}
_EXP_AVG = {"exp_avg": FIRST_MOMENT, "exp_avg_sq": SECOND_MOMENT}
_CENTRED = wide("centred", "nu - mu**2 is a small difference that rounding makes negative: NaN")
_SECANT = wide("secant", "differences of points and of gradients, and what they are taken from", 1)
_SLOW = wide("slow_mean", "moves by 1e-4 of itself a step, which 8 bits do not see", 1)
_BET = wide("bet", "a sum of all steps, in which 8 bits lose single ones", signed=False)
_STEP = wide("step_size", "doubled and halved by every step, between 1e-6 and 50", signed=False)
_KEPT = wide("gradient", "handed back as the gradient of the next step", 1)
_SEEN = wide("measurement", "what the caller measures")
_LINE_SEARCH = {"grad": _KEPT}

# A field that is not here is a counter, or a state inside. The classes are told by their names, as
# some are not public, together with their fields.
OPTAX: Mapping[str, Roles] = MappingProxyType(
    {
        "ApplyEvery": {"grad_acc": PENDING},
        "COCOBState": {
            "init_particles": POINT,
            "cumulative_gradients": GRADIENT_SUM,
            "scale": _BET,
            "subgradients": _BET,
            "reward": _BET,
        },
        "DAdaptAdamWState": {**_EXP_AVG, "grad_sum": FIRST_MOMENT},  # it decays
        "DoGState": {"init_params": POINT},
        "DoWGState": {"init_params": POINT},
        "EmaState": {"ema": FIRST_MOMENT},
        "FactoredState": {"v_row": FACTOR, "v_col": FACTOR, "v": SECOND_MOMENT},
        "GaLoreState": {"projector": BASIS},
        "MadgradState": {"grad_sum_sq": SECOND_MOMENT, "s": GRADIENT_SUM, "x0": POINT},
        "MechanicState": {"x0": POINT},
        "MomoAdamState": _EXP_AVG,
        "MomoState": {"exp_avg": FIRST_MOMENT},
        "MultiStepsState": {"acc_grads": PENDING},
        "MuonState": {"mu": FIRST_MOMENT},
        "ProdigyState": {**_EXP_AVG, "grad_sum": FIRST_MOMENT, "params0": POINT},  # it decays
        "SAMState": {"cache": POINT},
        "ScaleByAdaDeltaState": {"e_g": SECOND_MOMENT, "e_x": SECOND_MOMENT},
        "ScaleByAdamState": _ADAM,
        "ScaleByAdanState": {
            "m": FIRST_MOMENT,
            "v": FIRST_MOMENT,
            "n": SECOND_MOMENT,
            "g": FIRST_MOMENT,
        },
        "ScaleByAdemamixState": {"m1": FIRST_MOMENT, "m2": _SLOW, "nu": SECOND_MOMENT},
        "ScaleByAmsgradState": {**_ADAM, "nu_max": SECOND_MOMENT},
        "ScaleByBacktrackingLinesearchState": _LINE_SEARCH,
        "ScaleByBeliefState": _ADAM,
        "ScaleByDistanceOverGradientsState": {"init_params": POINT},
        "ScaleByLBFGSState": dict.fromkeys(
            ("params", "updates", "diff_params_memory", "diff_updates_memory"), _SECANT
        ),
        "ScaleByLionState": {"mu": FIRST_MOMENT},
        "ScaleByNovogradState": _ADAM,  # nu: a scalar per leaf
        "ScaleByOptimisticGradientState": {"previous_gradient": FIRST_MOMENT},
        "ScaleByRStdDevState": {"mu": _CENTRED, "nu": _CENTRED},
        "ScaleByRStdDevWithCountState": {"mu": _CENTRED, "nu": _CENTRED},
        "ScaleByRmsState": {"nu": SECOND_MOMENT},
        "ScaleByRmsWithCountState": {"nu": SECOND_MOMENT},
        "ScaleByRpropState": {"step_sizes": _STEP, "prev_updates": FIRST_MOMENT},
        "ScaleByRssState": {"sum_of_squares": SECOND_MOMENT},
        "ScaleBySM3State": {"mu": FACTOR, "nu": FIRST_MOMENT},  # so named there
        "ScaleBySimplifiedAdEMAMixState": {"m": FIRST_MOMENT, "n": SECOND_MOMENT},
        "ScaleByZoomLinesearchState": _LINE_SEARCH,
        "ScheduleFreeState": {"z": POINT},
        "SnapshotState": {"measurement": _SEEN},
        "SophiaState": {"mu": FIRST_MOMENT, "nu": CURVATURE},
        "TraceState": {"trace": FIRST_MOMENT},
    }
)
