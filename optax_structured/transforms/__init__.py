"""Small elements of general use, each useful in any optax chain."""

from optax_structured.transforms.accumulate import AccumulateState, accumulate
from optax_structured.transforms.adam import (
    BiasCorrectionState,
    DebiasedAdamState,
    bias_correction,
    debiased_adam,
    uncorrected_adam,
)
from optax_structured.transforms.agreement import SignAgreementState, sign_agreement
from optax_structured.transforms.decay import DecayState, decay_updated_weights
from optax_structured.transforms.friction import (
    Friction,
    GradientFrictionState,
    gradient_friction,
    scale_by_diffgrad,
)
from optax_structured.transforms.limiter import NormGrowthLimiterState, limit, norm_growth_limiter
from optax_structured.transforms.mirror_madgrad import (
    ScaleByMirrorMadgradState,
    scale_by_mirror_madgrad,
)
from optax_structured.transforms.newton_schulz import newton_schulz, orthogonalize
from optax_structured.transforms.nonfinite import SkipNonfiniteState, skip_nonfinite
from optax_structured.transforms.primal_averaging import PrimalAveragingState, primal_averaging
from optax_structured.transforms.rms import uncorrected_rms
from optax_structured.transforms.storm import StormState, corrected_average, storm
from optax_structured.transforms.weight_norm import (
    LookaheadState,
    WeightNormalizedState,
    lookahead_weight_norm,
    weight_normalized,
)

__all__ = [
    "AccumulateState",
    "BiasCorrectionState",
    "DebiasedAdamState",
    "DecayState",
    "Friction",
    "GradientFrictionState",
    "LookaheadState",
    "NormGrowthLimiterState",
    "PrimalAveragingState",
    "ScaleByMirrorMadgradState",
    "SignAgreementState",
    "StormState",
    "SkipNonfiniteState",
    "WeightNormalizedState",
    "accumulate",
    "bias_correction",
    "corrected_average",
    "debiased_adam",
    "decay_updated_weights",
    "gradient_friction",
    "limit",
    "lookahead_weight_norm",
    "newton_schulz",
    "norm_growth_limiter",
    "orthogonalize",
    "primal_averaging",
    "scale_by_diffgrad",
    "scale_by_mirror_madgrad",
    "sign_agreement",
    "storm",
    "skip_nonfinite",
    "uncorrected_adam",
    "uncorrected_rms",
    "weight_normalized",
]
