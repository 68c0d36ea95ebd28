"""Recipes by name, with the hyperparameters and the protocol of their published runs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from optax_structured.proximal import Exact, ProximalGradient, Stages, restart_at
from optax_structured.recipes import prox_adam, prox_sgd, prox_ssi, ramda, rmda
from optax_structured.regularizers import L1, GroupLasso, NuclearNorm
from optax_structured.regularizers.layer_axes import DENSE_INPUTS
from optax_structured.training.names import check_known
from optax_structured.trees import Rules, rules

# Regularizers, each with the one metric that says how structured a run is, and its name.
REGULARIZERS = {
    "group_lasso": ("weighted", "weighted group sparsity"),
    "l1": ("weighted", "sparsity of the kernels"),
    "nuclear": ("low_rank", "low-rank level"),
    "none": ("unstructured", "sparsity"),
}


class Hyperparameters(NamedTuple):
    """What every recipe takes; a recipe ignores what it does not have."""

    learning_rate: float
    strength: float
    momentum: float  # b1 of the recipes of Adam's family
    eps: float


class Recipe(NamedTuple):
    """How to build an optimizer in stages, and the defaults of its published runs."""

    build: Callable[[Hyperparameters, Rules | None, Stages], optax.GradientTransformation]
    defaults: Hyperparameters  # logistic regression on MNIST, group lasso
    nuclear: Hyperparameters  # MLP on Fashion-MNIST, nuclear norm
    averages: bool = False  # W is an average of prox points, and structured only at the end

    def takes(self, option: str) -> bool:
        """Whether this recipe has an option."""
        return option not in ("strength", "eps") or getattr(self.defaults, option) > 0


def _ramda(h: Hyperparameters, structure: Rules | None, stages: Stages) -> Any:
    optimizer = ramda(
        stages.decay(h.learning_rate),
        structure,
        h.strength,
        momentum=stages.momentum(h.momentum),
        eps=stages.decay(h.eps),
        solver=_solver(structure),
        keep_point=True,
    )
    return restart_at(optimizer, stages.milestones)


def _rmda(h: Hyperparameters, structure: Rules | None, stages: Stages) -> Any:
    optimizer = rmda(
        stages.decay(h.learning_rate),
        structure,
        h.strength,
        momentum=stages.momentum(h.momentum),
        keep_point=True,
    )
    return restart_at(optimizer, stages.milestones)


def _prox_sgd(h: Hyperparameters, structure: Rules | None, stages: Stages) -> Any:
    return prox_sgd(stages.decay(h.learning_rate), structure, h.strength, momentum=h.momentum)


def _adam_like(recipe: Callable[..., Any]) -> Callable[..., Any]:
    def build(h: Hyperparameters, structure: Rules | None, stages: Stages) -> Any:
        rate, solver = stages.decay(h.learning_rate), _solver(structure)
        return recipe(rate, structure, h.strength, b1=h.momentum, eps=h.eps, solver=solver)

    return build


def _adamw(h: Hyperparameters, structure: Rules | None, stages: Stages) -> Any:
    del structure
    return optax.adamw(stages.decay(h.learning_rate), b1=h.momentum, eps=h.eps)


# Learning rate, strength, momentum (1 - c), eps.
RECIPES = {
    "ramda": Recipe(
        _ramda,
        Hyperparameters(1e-2, 1e-3, 0.99, 1e-6),
        Hyperparameters(1e-2, 1e-3, 0.9, 1e-6),
        averages=True,
    ),
    "rmda": Recipe(
        _rmda,
        Hyperparameters(0.1, 1e-3, 0.9, 0.0),
        Hyperparameters(0.1, 5e-3, 0.9, 0.0),
        averages=True,
    ),
    "prox_sgd": Recipe(
        _prox_sgd, Hyperparameters(0.1, 1e-3, 0.9, 0.0), Hyperparameters(0.1, 5e-3, 0.9, 0.0)
    ),
    "prox_adam": Recipe(
        _adam_like(prox_adam),
        Hyperparameters(1e-3, 1e-3, 0.9, 1e-8),
        Hyperparameters(1e-3, 3.5e-3, 0.9, 1e-8),
    ),
    "prox_ssi": Recipe(
        _adam_like(prox_ssi),
        Hyperparameters(1e-3, 1e-3, 0.9, 1e-6),
        Hyperparameters(1e-3, 3.5e-3, 0.9, 1e-6),
    ),
    "adamw": Recipe(
        _adamw, Hyperparameters(1e-3, 0.0, 0.9, 1e-8), Hyperparameters(1e-3, 0.0, 0.9, 1e-8)
    ),
}


def find(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
      ValueError: there is none; lists them all, and the nearest.
    """
    check_known("recipe", name, RECIPES)
    return RECIPES[name]


def published(name: str, regularizer: str, last_stage: int) -> Hyperparameters:
    """The defaults of a recipe in a run whose last stage has `last_stage` steps.

    Published runs are long: c = 1 - momentum reaches 1, where W itself becomes structured, within
    the first fifth of the last stage. A shorter run starts from a c that does the same.
    """
    recipe = find(name)
    chosen = recipe.nuclear if regularizer == "nuclear" else recipe.defaults
    if regularizer == "none":
        chosen = chosen._replace(strength=0.0)
    if not recipe.averages:
        return chosen
    longest = max(0.0, 1 - math.sqrt(5 / last_stage))
    return chosen._replace(momentum=round(min(chosen.momentum, longest), 4))


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


def _solver(structure: Rules | None) -> Exact | ProximalGradient:
    """Exact where there is a closed form; for the nuclear norm the published few iterations."""
    nuclear = structure is not None and isinstance(structure.default, NuclearNorm)
    return ProximalGradient(max_iters=5, rtol=1e-3) if nuclear else Exact()


def measure(regularizer: str) -> tuple[str, str]:
    """The metric that says how structured a run is, and what to call it."""
    return REGULARIZERS[regularizer]
