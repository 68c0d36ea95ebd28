"""Regularizers: value, prox in a diagonal metric, and support, one family per file."""

from optax_structured.regularizers.base import Norm, Regularizer
from optax_structured.regularizers.binary import DistanceToSign
from optax_structured.regularizers.certificate import certificate
from optax_structured.regularizers.constraints import Box, NonNegative
from optax_structured.regularizers.coupled import CoupledGroupLasso
from optax_structured.regularizers.entrywise import L1, ElasticNet
from optax_structured.regularizers.folded_concave import MCP, SCAD
from optax_structured.regularizers.group import (
    GroupL0,
    GroupLasso,
    NonNegativeGroupLasso,
    SparseGroupLasso,
)
from optax_structured.regularizers.group_mcp import GroupMCP
from optax_structured.regularizers.nuclear import NuclearNorm
from optax_structured.regularizers.powers import L0, LHalf, LTwoThirds
from optax_structured.regularizers.simplex import Simplex
from optax_structured.regularizers.total_variation import TotalVariation

__all__ = [
    "L0",
    "L1",
    "MCP",
    "SCAD",
    "Box",
    "CoupledGroupLasso",
    "DistanceToSign",
    "ElasticNet",
    "GroupL0",
    "GroupLasso",
    "GroupMCP",
    "LHalf",
    "LTwoThirds",
    "NonNegative",
    "NonNegativeGroupLasso",
    "Norm",
    "NuclearNorm",
    "Regularizer",
    "Simplex",
    "SparseGroupLasso",
    "TotalVariation",
    "certificate",
]
