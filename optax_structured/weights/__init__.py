"""Parameters in another form: products of factors, codes of 8 bits, a grid."""

from optax_structured.weights.base import Form, Weight, merge
from optax_structured.weights.factors import Factors, factorize, train_factors
from optax_structured.weights.on_grid import KeepOnGridState, keep_on_grid
from optax_structured.weights.quantized import QuantizedWeight, apply_updates, quantize_weights
from optax_structured.weights.spectra import singular_values
from optax_structured.weights.welore import (
    LLAMA_2_THRESHOLDS,
    WelorePlan,
    WelorePlanEntry,
    welore_plan,
)

__all__ = [
    "LLAMA_2_THRESHOLDS",
    "Factors",
    "Form",
    "KeepOnGridState",
    "QuantizedWeight",
    "Weight",
    "WelorePlan",
    "WelorePlanEntry",
    "apply_updates",
    "factorize",
    "keep_on_grid",
    "merge",
    "quantize_weights",
    "singular_values",
    "train_factors",
    "welore_plan",
]
