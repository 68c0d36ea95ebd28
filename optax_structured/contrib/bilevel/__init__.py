"""Two levels of optimization: hyperparameters over parameters, architectures over weights."""

from optax_structured.contrib.bilevel.alternation import AlternationState, alternation
from optax_structured.contrib.bilevel.base import BilevelSolver
from optax_structured.contrib.bilevel.bsvrb import BSVRBState, Estimator, bsvrb
from optax_structured.contrib.bilevel.lv_hba import LVHBAState, growing_penalty, lv_hba
from optax_structured.contrib.bilevel.msvr import MSVRState, msvr
from optax_structured.contrib.bilevel.projections import affine_projection, dykstra
from optax_structured.contrib.bilevel.superposition import (
    Decision,
    architecture_weights,
    extract,
    superpose,
    superposition_mask,
)

__all__ = [
    "AlternationState",
    "BSVRBState",
    "BilevelSolver",
    "Decision",
    "Estimator",
    "LVHBAState",
    "MSVRState",
    "affine_projection",
    "alternation",
    "architecture_weights",
    "bsvrb",
    "dykstra",
    "extract",
    "growing_penalty",
    "lv_hba",
    "msvr",
    "superpose",
    "superposition_mask",
]
