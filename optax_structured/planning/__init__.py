"""What a run will need, before anything is allocated: weights, gradients, optimizer state."""

from optax_structured.planning.chips import CHIPS, find_chip
from optax_structured.planning.inputs import low_rank_rules, named_model, parse_mesh, read_params
from optax_structured.planning.plan import RECIPES, Plan, largest_rank, make_plan, place
from optax_structured.planning.tables import render

__all__ = [
    "CHIPS",
    "RECIPES",
    "Plan",
    "find_chip",
    "largest_rank",
    "low_rank_rules",
    "make_plan",
    "named_model",
    "parse_mesh",
    "place",
    "read_params",
    "render",
]
