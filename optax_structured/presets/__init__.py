"""Rules for the layers of a model: which of its leaves are kernels, and which axes are inputs.

`groups` and `low_rank` read them off models of flax (linen and nnx), equinox and haiku. The
constants are the group axes of single leaves in the layouts of flax and haiku, (in, out).
"""

from optax_structured.presets.kernels import Kernel
from optax_structured.presets.rules import axes, groups, kernels, low_rank
from optax_structured.regularizers.layer_axes import (
    ATTENTION_IN_HEADS,
    ATTENTION_IN_INPUTS,
    ATTENTION_OUT_HEADS,
    ATTENTION_OUT_INPUTS,
    CONV_FILTERS,
    CONV_INPUTS,
    DENSE_INPUTS,
    DENSE_OUTPUTS,
    DEPTHWISE_FILTERS,
    stacked,
)

__all__ = [
    "ATTENTION_IN_HEADS",
    "ATTENTION_IN_INPUTS",
    "ATTENTION_OUT_HEADS",
    "ATTENTION_OUT_INPUTS",
    "CONV_FILTERS",
    "CONV_INPUTS",
    "DENSE_INPUTS",
    "DENSE_OUTPUTS",
    "DEPTHWISE_FILTERS",
    "Kernel",
    "axes",
    "groups",
    "kernels",
    "low_rank",
    "stacked",
]
