"""Trainable data beside frozen weights: made by a table of rules, merged, saved, shrunk."""

from optax_structured.adapters.attach import Attached, attach
from optax_structured.adapters.factor_gradients import Damped, FactorSolver, MinimumNorm
from optax_structured.adapters.factored import factored
from optax_structured.adapters.full import Delta, Full
from optax_structured.adapters.lora import LoRA, Pair
from optax_structured.adapters.lora_plus import scale_b
from optax_structured.adapters.lora_pro import decayed, lora_pro, lora_pro_full
from optax_structured.adapters.nodes import Adapter, Node
from optax_structured.adapters.svfit import Spectrum, SVFit
from optax_structured.adapters.tree import constants, describe, init, merge, sub

__all__ = [
    "Adapter",
    "Attached",
    "Damped",
    "Delta",
    "FactorSolver",
    "Full",
    "LoRA",
    "MinimumNorm",
    "Node",
    "Pair",
    "SVFit",
    "Spectrum",
    "attach",
    "constants",
    "decayed",
    "describe",
    "factored",
    "init",
    "lora_pro",
    "lora_pro_full",
    "merge",
    "scale_b",
    "sub",
]
