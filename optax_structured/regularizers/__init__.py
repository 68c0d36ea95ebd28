"""Regularizers: value, prox in a diagonal metric, support and zero test, one family a file."""

from optax_structured.regularizers import presets
from optax_structured.regularizers.base import Regularizer
from optax_structured.regularizers.certificate import certificate
from optax_structured.regularizers.constraints import Box, NonNegative
from optax_structured.regularizers.entrywise import L1, ElasticNet
from optax_structured.regularizers.folded_concave import MCP, SCAD
from optax_structured.regularizers.group import GroupL0, GroupLasso, SparseGroupLasso
from optax_structured.regularizers.group_mcp import GroupMCP
from optax_structured.regularizers.hard import L0, LHalf, LTwoThirds
from optax_structured.regularizers.nuclear import NuclearNorm

__all__ = [
    "L0",
    "L1",
    "MCP",
    "SCAD",
    "Box",
    "ElasticNet",
    "GroupL0",
    "GroupLasso",
    "GroupMCP",
    "LHalf",
    "LTwoThirds",
    "NonNegative",
    "NuclearNorm",
    "Regularizer",
    "SparseGroupLasso",
    "certificate",
    "presets",
]
