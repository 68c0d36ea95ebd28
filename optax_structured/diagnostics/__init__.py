"""What a training run shows: structure of parameters, low-rank subspaces, skipped gradients."""

from optax_structured.diagnostics.layers import LayerRow, layer_rows, supports
from optax_structured.diagnostics.nonfinite import Nonfinite, nonfinite
from optax_structured.diagnostics.sparsity import (
    low_rank_level,
    structured_sparsity,
    unstructured_sparsity,
    weighted_sparsity,
)
from optax_structured.diagnostics.stationarity import objective, stationarity
from optax_structured.diagnostics.strengths import strength_max, strength_path
from optax_structured.diagnostics.subspaces import (
    captured_energy,
    effective_rank,
    limiter_activity,
    subspace_overlap,
)

__all__ = [
    "LayerRow",
    "Nonfinite",
    "captured_energy",
    "effective_rank",
    "layer_rows",
    "limiter_activity",
    "low_rank_level",
    "nonfinite",
    "objective",
    "stationarity",
    "strength_max",
    "strength_path",
    "structured_sparsity",
    "subspace_overlap",
    "supports",
    "unstructured_sparsity",
    "weighted_sparsity",
]
