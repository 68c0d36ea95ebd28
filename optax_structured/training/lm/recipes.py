"""Recipes of the language-model job by name, with their published scale."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

import optax_structured as oxs
from optax_structured.training.lm.model import PLAIN
from optax_structured.training.names import check_known
from optax_structured.training.state_bits import codec_of, with_moments
from optax_structured.trees import Axes, Rules, rules


class Recipe(NamedTuple):
    """What a recipe starts from."""

    learning_rate: float
    scale: float | None = None  # of the low-rank part of the update; None: the recipe has none
    low_rank: bool = True
    rank: int | None = None  # None: a quarter of the model's width
    period: int = 50  # steps from one refresh of the bases to the next
    codec: oxs.Affine | None = None  # of the bases


RECIPES = {
    "adamw": Recipe(3e-3, low_rank=False),
    "galore": Recipe(1e-2, scale=0.25),
    "q_galore": Recipe(1.5e-2, scale=0.25, codec=oxs.Affine(bits=4)),
    "fira": Recipe(1e-2, scale=0.25),
    "apollo": Recipe(1e-2, scale=1.0),
    "apollo_mini": Recipe(1e-2, scale=128**0.5, rank=1),
    "dct_adamw": Recipe(3e-3, period=1),
    "ldadam": Recipe(3e-3, period=1),
    "trion": Recipe(2e-2, period=1),
    "grad_norm_lorp": Recipe(1e-2, scale=0.25),
}
# Kernels here are (inputs, outputs), the published recipes speak of (outputs, inputs).
_AXES = Axes(rows=-1, cols=-2)
# Share of Trion's rate that Adam takes for embedding, head and norms.
_ADAM_OF_TRION = 0.1
PROJECTORS = {
    "svd": "SVD",
    "randomized": "RandomizedRange",
    "subspace": "SubspaceIteration",
    "random": "RandomProjection",
    "dct": "DCT",
}
REFRESHES = {"periodic": "Periodic", "staggered": "Staggered", "lazy": "Lazy"}
TRANSPORTS = {
    "keep": "Keep",
    "align": "Align",
    "rotate": "Rotate",
    "reset": "Reset",
    "variance_aware": "VarianceAware",
}
# The orthogonal parts of a `LowRank` that go by a name here.
PARTS = {"projector": PROJECTORS, "refresh": REFRESHES, "transport": TRANSPORTS}


def find(name: str) -> Recipe:
    """The recipe of this name, or a ValueError that lists them all."""
    check_known("recipe", name, RECIPES)
    return RECIPES[name]


def structure(
    rank: int, period: int, parts: Mapping[str, str | None], codec: oxs.Affine | None = None
) -> Rules:
    """All matrices of attention and MLP in low rank; embedding, head and norms are left plain.

    Args:
      rank: what is kept of the smaller side of a matrix.
      period: steps from one refresh of the bases to the next.
      parts: names of `PARTS`; None is what the recipe itself uses.
      codec: of the bases; None is float32.
    """
    chosen: dict[str, Any] = {
        part: None if name is None else getattr(oxs, PARTS[part][name])()
        for part, name in parts.items()
    }
    return rules((PLAIN, None), default=oxs.LowRank(rank, period, _AXES, codec=codec, **chosen))


def build(
    name: str,
    learning_rate: optax.Schedule,
    low_rank: Rules | None,
    *,
    scale: float | None,
    weight_decay: float,
    clip: float,
    state_bits: int = 32,
) -> optax.GradientTransformation:
    """The optimizer.

    Args:
      name: of the recipe.
      learning_rate: a schedule.
      low_rank: which leaf gets which `LowRank`; None for adamw.
      scale: None where the recipe has none.
      weight_decay: decoupled.
      clip: largest norm of the whole gradient; 0 does not clip.
      state_bits: of an entry of a moment: 32, 8 or 4.
    """
    given: dict[str, Any] = {} if scale is None else {"scale": scale}
    if name == "trion":
        given["adam_learning_rate"] = lambda count: _ADAM_OF_TRION * learning_rate(count)
    recipe = optax.adamw if low_rank is None else getattr(oxs, name)
    structured = () if low_rank is None else (low_rank,)
    recipe = with_moments(recipe, codec_of(state_bits))
    optimizer = recipe(learning_rate, *structured, weight_decay=weight_decay, **given)
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer
