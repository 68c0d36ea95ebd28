"""The exact configuration of a run: made once, checked once, stored with the run."""

import dataclasses
import pathlib
from typing import Any

from optax_structured.checks import check_fraction, check_nonnegative, check_positive
from optax_structured.training import folder
from optax_structured.training.images import data, recipes_table
from optax_structured.training.state_bits import codec_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run, with no default left open."""

    data: str
    data_dir: str  # may differ between a run and its continuation
    model: str
    recipe: str
    regularizer: str
    strength: float
    learning_rate: float
    momentum: float
    eps: float
    epochs: int
    batch_size: int
    milestones: tuple[int, ...]  # epochs after which the next stage begins
    seed: int
    state_bits: int = 32  # of an entry of a moment; runs from before the option have 32

    def __post_init__(self) -> None:
        recipe = recipes_table.find(self.recipe)
        recipes_table.structure(self.regularizer)
        if codec_of(self.state_bits) is not None and recipe.averages:
            others = [name for name, other in recipes_table.RECIPES.items() if not other.averages]
            raise ValueError(
                f"recipe {self.recipe!r} keeps sums of all gradients, which {self.state_bits} bits "
                f"do not hold; leave --state-bits out, or choose one of {', '.join(others)}"
            )
        check_positive("learning_rate", self.learning_rate)
        check_nonnegative("strength", self.strength)
        check_fraction("momentum", self.momentum)
        if recipe.defaults.eps:
            check_positive("eps", self.eps)
        elif self.eps:
            raise ValueError(f"recipe {self.recipe!r} has no eps; leave --eps out")
        if self.strength and (self.recipe == "adamw" or self.regularizer == "none"):
            raise ValueError(
                f"strength {self.strength} would have no effect with recipe {self.recipe!r} and "
                f"regularizer {self.regularizer!r}; leave --strength out, or choose others"
            )
        if list(self.milestones) != sorted(set(self.milestones) & set(range(1, self.epochs))):
            raise ValueError(
                f"milestones must be increasing epochs between 1 and {self.epochs - 1} (the run "
                f"has {self.epochs} epochs), got {', '.join(map(str, self.milestones))}"
            )


def load(path: pathlib.Path) -> Config:
    """The configuration of a run folder; raises as `stored_fields`."""
    return folder.load_config(path, Config)


def make(given: dict[str, Any], train_size: int) -> Config:
    """A complete configuration from the options that were given, the rest by default.

    Args:
      given: fields of `Config`; also `stages`, a number of equal stages (default 5) in place of
        `milestones`. None counts as not given.
      train_size: number of training images, from which the length of a stage in steps follows.

    Raises:
      ValueError: an option out of range, or two that contradict each other.
    """
    given = {key: value for key, value in given.items() if value is not None}
    stages = given.pop("stages", None)
    if stages is not None and "milestones" in given:
        raise ValueError("give --stages (a number of equal stages) or --milestones, not both")
    name, epochs = given.get("data", "digits"), given.get("epochs", 100)
    chosen: dict[str, Any] = {
        "data": name,
        "data_dir": data.FASHION_MNIST_DIR,
        "model": "conv",
        "recipe": "ramda",
        "regularizer": "group_lasso",
        "epochs": epochs,
        "batch_size": 32 if name == "digits" else 128,
        "milestones": _equal_stages(epochs, 5 if stages is None else stages),
        "seed": 0,
        **given,
    }
    if not 1 <= chosen["batch_size"] <= train_size:
        raise ValueError(
            f"batch_size must be between 1 and the {train_size} training images, "
            f"got {chosen['batch_size']}"
        )
    last_stage = (epochs - max(chosen["milestones"], default=0)) * (
        train_size // chosen["batch_size"]
    )
    recipe, regularizer = chosen["recipe"], chosen["regularizer"]
    defaults = recipes_table.published(recipe, regularizer, max(last_stage, 1))
    return Config(**{**defaults._asdict(), **chosen})


def check_same(stored: Config, given: dict[str, Any]) -> None:
    """Raises ValueError unless every option that was given is what the stored run has."""
    if given.get("stages") is not None:
        given = {**given, "milestones": _equal_stages(stored.epochs, given["stages"])}
    folder.check_same(stored, given, ignoring=("data_dir", "stages"))


def _equal_stages(epochs: int, stages: int) -> tuple[int, ...]:
    if epochs < 1 or stages < 1:
        raise ValueError(f"epochs and stages must be at least 1, got {epochs} and {stages}")
    return tuple(sorted({epochs * i // stages for i in range(1, stages)} - {0}))
