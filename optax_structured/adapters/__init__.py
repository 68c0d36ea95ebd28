"""Trainable data beside frozen weights: made by a table of rules, merged, saved, shrunk."""

from optax_structured.adapters.allocation import AllocatorState, Importance, SparsityAllocator
from optax_structured.adapters.attach import Attached, attach
from optax_structured.adapters.codebook_weight import (
    codebook_weight,
    footprint_bits,
    pack_codes,
    unpack_codes,
)
from optax_structured.adapters.codebooks import Codebook, Codes
from optax_structured.adapters.factor_gradients import Damped, FactorSolver, MinimumNorm
from optax_structured.adapters.factored import factored
from optax_structured.adapters.files import export, load
from optax_structured.adapters.full import Delta, Full
from optax_structured.adapters.ggpo import GGPO, GGPOState, RowNorms
from optax_structured.adapters.lora import LoRA, Pair, StartFactors
from optax_structured.adapters.lora_plus import scale_b
from optax_structured.adapters.lora_pro import decayed, lora_pro, lora_pro_full
from optax_structured.adapters.mgpo import MGPO, MGPOState
from optax_structured.adapters.nodes import Adapter, Node
from optax_structured.adapters.pairs import shrink, stack_pairs
from optax_structured.adapters.perturbation import Perturbation, perturbed_value_and_grad
from optax_structured.adapters.rebalance import (
    RebalanceState,
    rebalance_factors,
    rebalance_once,
)
from optax_structured.adapters.snell import SNELL, SNELLA, Kernel
from optax_structured.adapters.svfit import Spectrum, SVFit, Triplets
from optax_structured.adapters.tree import constants, describe, init, merge, sub

__all__ = [
    "Adapter",
    "AllocatorState",
    "Attached",
    "Codebook",
    "Codes",
    "Damped",
    "Delta",
    "FactorSolver",
    "Full",
    "GGPO",
    "GGPOState",
    "Importance",
    "Kernel",
    "LoRA",
    "MGPO",
    "MGPOState",
    "MinimumNorm",
    "Node",
    "Pair",
    "Perturbation",
    "RebalanceState",
    "RowNorms",
    "SNELL",
    "SNELLA",
    "SVFit",
    "SparsityAllocator",
    "Spectrum",
    "StartFactors",
    "Triplets",
    "attach",
    "codebook_weight",
    "constants",
    "decayed",
    "describe",
    "export",
    "factored",
    "footprint_bits",
    "init",
    "load",
    "lora_pro",
    "lora_pro_full",
    "merge",
    "pack_codes",
    "perturbed_value_and_grad",
    "rebalance_factors",
    "rebalance_once",
    "scale_b",
    "shrink",
    "stack_pairs",
    "sub",
    "unpack_codes",
]
