"""Recipes by name, with the hyperparameters and the protocol of their published runs."""

import math
from typing import Any

from optax_structured.proximal import Exact, ProximalGradient
from optax_structured.recipes.registry import ImageRun
from optax_structured.regularizers import L1, GroupLasso, NuclearNorm
from optax_structured.regularizers.layer_axes import DENSE_INPUTS
from optax_structured.step_sizes import Stages
from optax_structured.training.names import check_known, chosen
from optax_structured.training.peers import KNOWN
from optax_structured.training.state_bits import codec_of, made
from optax_structured.trees import Rules, rules

# Regularizers, each with the one metric that says how structured a run is, and its name.
REGULARIZERS = {
    "group_lasso": ("weighted", "weighted group sparsity"),
    "l1": ("weighted", "sparsity of the kernels"),
    "nuclear": ("low_rank", "low-rank level"),
    "none": ("unstructured", "sparsity"),
}
RECIPES = {name: recipe.images for name, recipe in KNOWN.items() if recipe.images}


def build(config: Any, learning_rate: Any, rules: Rules | None, stages: Stages) -> Any:
    """The optimizer of a `Config` whose first stage has this learning rate."""
    recipe = KNOWN[config.recipe]
    given = {"momentum" if recipe.takes("momentum") else "b1": config.momentum}
    # The nuclear norm has no closed form: the published few iterations.
    nuclear = rules is not None and isinstance(rules.default, NuclearNorm)
    solver = ProximalGradient(max_iters=5, rtol=1e-3) if nuclear else Exact()
    others = {"eps": config.eps, "solver": solver, "stages": stages}
    given |= {name: value for name, value in others.items() if recipe.takes(name)}
    if recipe.averages:
        given["keep_point"] = True
    else:
        learning_rate = stages.decay(learning_rate)
    penalty = () if recipe.family == "plain" else (rules, config.strength)
    return made(config.recipe, codec_of(config.state_bits), learning_rate, *penalty, **given)


def published(name: str, regularizer: str, last_stage: int) -> ImageRun:
    """The defaults of a recipe in a run whose last stage has `last_stage` steps.

    Published runs are long: c = 1 - momentum reaches 1, where W itself becomes structured, within
    the first fifth of the last stage. A shorter run starts from a c that does the same.
    """
    run, recipe = chosen("recipe", name, RECIPES), KNOWN[name]
    if regularizer == "nuclear":
        run = recipe.nuclear or run
    if regularizer == "none":
        run = run._replace(strength=0.0)
    if not recipe.averages:
        return run
    longest = max(0.0, 1 - math.sqrt(5 / last_stage))
    return run._replace(momentum=round(min(run.momentum, longest), 4))


def structure(regularizer: str) -> Rules | None:
    """Which leaf of the networks here gets which regularizer; biases are left plain.

    Raises:
      ValueError: an unknown name.
    """
    if regularizer == "group_lasso":  # a group is what a layer reads from one input
        return rules(("bias", None), default=GroupLasso(DENSE_INPUTS))
    if regularizer == "l1":
        return rules(("bias", None), default=L1())
    if regularizer == "nuclear":  # of dense kernels, as in the published runs
        return rules((r"bias|^Conv", None), default=NuclearNorm())
    check_known("regularizer", regularizer, REGULARIZERS)
    return None
