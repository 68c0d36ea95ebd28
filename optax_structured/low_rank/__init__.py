"""Low-rank projection of gradients: a wrapper around any transformation, and its parts."""

from optax_structured.low_rank.factors import Factors, factorize, merge, train_factors
from optax_structured.low_rank.frames import Frame
from optax_structured.low_rank.ldadam import LDAdamState, scale_by_ldadam
from optax_structured.low_rank.projectors import (
    DCT,
    SVD,
    OneSided,
    Projector,
    RandomizedRange,
    RandomProjection,
    SubspaceIteration,
    Tucker,
    TwoSided,
)
from optax_structured.low_rank.refit import RefreshState
from optax_structured.low_rank.refresh import (
    External,
    Lazy,
    LazyState,
    Periodic,
    Refresh,
    Staggered,
)
from optax_structured.low_rank.residuals import (
    Drop,
    ErrorFeedback,
    NormScaled,
    Residual,
    Scaling,
)
from optax_structured.low_rank.spec import LowRank
from optax_structured.low_rank.spectra import singular_values
from optax_structured.low_rank.transports import (
    Align,
    Keep,
    Reset,
    Rotate,
    Transport,
    VarianceAware,
)
from optax_structured.low_rank.welore import (
    LLAMA_2_THRESHOLDS,
    WelorePlan,
    WelorePlanEntry,
    welore_plan,
)
from optax_structured.low_rank.wrapper import LowRankState, low_rank_projection

__all__ = [
    "DCT",
    "SVD",
    "Align",
    "Drop",
    "ErrorFeedback",
    "External",
    "Factors",
    "Frame",
    "Keep",
    "LDAdamState",
    "LLAMA_2_THRESHOLDS",
    "Lazy",
    "LazyState",
    "LowRank",
    "LowRankState",
    "NormScaled",
    "OneSided",
    "Periodic",
    "Projector",
    "RandomProjection",
    "RandomizedRange",
    "Refresh",
    "RefreshState",
    "Reset",
    "Residual",
    "Rotate",
    "Scaling",
    "Staggered",
    "SubspaceIteration",
    "Transport",
    "Tucker",
    "TwoSided",
    "VarianceAware",
    "WelorePlan",
    "WelorePlanEntry",
    "factorize",
    "low_rank_projection",
    "merge",
    "scale_by_ldadam",
    "singular_values",
    "train_factors",
    "welore_plan",
]
