"""Low-rank projection of gradients: a wrapper around any transformation, and its parts."""

from optax_structured.low_rank.ldadam import LDAdamState, scale_by_ldadam
from optax_structured.low_rank.refit import RefreshState
from optax_structured.low_rank.refresh import (
    External,
    Lazy,
    LazyState,
    Periodic,
    Refresh,
    Staggered,
)
from optax_structured.low_rank.residuals import Drop, ErrorFeedback, NormScaled, Residual, Scaling
from optax_structured.low_rank.spec import LowRank
from optax_structured.low_rank.transports import Align, Keep, Reset, Rotate, Transport
from optax_structured.low_rank.wrapper import LowRankState, low_rank_projection
from optax_structured.projectors import (
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

__all__ = [
    "DCT",
    "SVD",
    "Align",
    "Drop",
    "ErrorFeedback",
    "External",
    "Keep",
    "LDAdamState",
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
    "low_rank_projection",
    "scale_by_ldadam",
]
