"""Recipes of the language-model job by name, with their published scale."""

from typing import Any

import optax

import optax_structured as oxs
from optax_structured.training.names import PLAIN, chosen
from optax_structured.training.peers import KNOWN
from optax_structured.training.schedule import shape_of_schedule
from optax_structured.training.state_bits import codec_of, made
from optax_structured.trees import Axes, Rules, rules

RECIPES = {name: recipe.text for name, recipe in KNOWN.items() if recipe.text}
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
TRANSPORTS = {"keep": "Keep", "align": "Align", "rotate": "Rotate", "reset": "Reset"}
# The orthogonal parts of a `LowRank` that go by a name here.
PARTS = {"projector": PROJECTORS, "refresh": REFRESHES, "transport": TRANSPORTS}


def structure(config: Any) -> Rules | None:
    """All matrices of attention and MLP in low rank; embedding, head and norms are left plain.

    None for a recipe that keeps full rank.
    """
    recipe = chosen("recipe", config.recipe, RECIPES)
    if recipe.period is None:
        return None
    parts = {
        part: getattr(oxs, known[name])()
        for part, known in PARTS.items()
        if (name := getattr(config, part)) is not None
    }
    spec = oxs.LowRank(config.rank, config.period, _AXES, codec=recipe.codec, **parts)
    return rules((PLAIN, None), default=spec)


def build(config: Any, peak: Any, low_rank: Rules | None) -> optax.GradientTransformation:
    """The optimizer of a `Config`, on its schedule; `peak` is the largest learning rate."""
    shape = shape_of_schedule(config.scheduled_steps)

    def rate(count: Any) -> Any:
        return peak * shape(count)

    given: dict[str, Any] = {} if config.scale is None else {"scale": config.scale}
    if KNOWN[config.recipe].takes("adam_learning_rate"):
        given["adam_learning_rate"] = lambda count: _ADAM_OF_TRION * rate(count)
    structured = () if low_rank is None else (low_rank,)
    codec, given["weight_decay"] = codec_of(config.state_bits), config.weight_decay
    optimizer = made(config.recipe, codec, rate, *structured, **given)
    clip = (optax.clip_by_global_norm(config.clip),) if config.clip else ()
    return oxs.skip_nonfinite(*clip, optimizer)
