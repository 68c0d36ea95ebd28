"""The exact configuration of a run of the task `images`."""

import dataclasses
from typing import Self

from optax_structured.training import config
from optax_structured.training.config import option
from optax_structured.training.images import data as sets
from optax_structured.training.images import models, recipes
from optax_structured.training.names import chosen, one_of
from optax_structured.training.state_bits import codec_of
from optax_structured.trees.checks import check_fraction, check_nonnegative, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Everything that decides the numbers of a run."""

    task: str = "images"
    recipe: str = "ramda"
    data: str = option(one_of(sets.NAMES), "digits")
    data_dir: str = option(
        "Folder of the Fashion-MNIST files", sets.FASHION_MNIST_DIR, said="that of Debian's package"
    )
    model: str = option(one_of(models.NAMES), "conv")
    regularizer: str = option(one_of(recipes.REGULARIZERS), "group_lasso")
    strength: float = option("Weight of the penalty; default as published", own=True)
    momentum: float = option(
        "Share of the last iterate that is kept (Adam's b1); default as published, less for ramda "
        "and rmda in short runs",
        own=True,
    )
    eps: float = option("Default as published", own=True)
    epochs: int = option("Passes over the images", 100)
    stages: int | None = option("Number of equal stages; default 5")
    milestones: tuple[int, ...] = option(
        "Epochs after which a stage ends, as 20,40,60, instead of --stages"
    )
    train_size: int  # images

    def __post_init__(self) -> None:
        recipe = chosen("recipe", self.recipe, recipes.RECIPES)
        recipes.structure(self.regularizer)
        self.fill(batch_size=32 if self.data == "digits" else 128, state_bits=32)
        if not 1 <= self.batch_size <= self.train_size:
            raise ValueError(
                f"batch_size must be between 1 and the {self.train_size} training images, "
                f"got {self.batch_size}"
            )
        self._fill_stages()
        last_stage = (self.epochs - max(self.milestones, default=0)) * self.steps_per_epoch
        self.fill(**recipes.published(self.recipe, self.regularizer, last_stage)._asdict())
        super().__post_init__()
        if codec_of(self.state_bits) is not None and self.recipe == "rmda":
            others = [name for name in recipes.RECIPES if name != "rmda"]
            raise ValueError(
                f"recipe 'rmda' keeps nothing but a sum of all gradients, which {self.state_bits} "
                f"bits do not hold; leave --state-bits out, or choose one of {', '.join(others)}"
            )
        check_nonnegative("strength", self.strength)
        check_fraction("momentum", self.momentum)
        if recipe.eps:
            check_positive("eps", self.eps)
        elif self.eps:
            raise ValueError(f"recipe {self.recipe!r} has no eps; leave --eps out")
        if self.strength and (self.recipe == "adamw" or self.regularizer == "none"):
            raise ValueError(
                f"strength {self.strength} would have no effect with recipe {self.recipe!r} and "
                f"regularizer {self.regularizer!r}; leave --strength out, or choose others"
            )

    @property
    def steps_per_epoch(self) -> int:
        """A last partial batch is left out."""
        return self.train_size // self.batch_size

    def extended(self, epochs: int) -> Self:
        """The last stage is longer."""
        return dataclasses.replace(self, epochs=epochs, stages=None)

    def _fill_stages(self) -> None:
        """`milestones` from `stages`."""
        self.fill(stages=5 if self.milestones is None else None)
        if self.stages is not None:
            if self.epochs < 1 or self.stages < 1:
                raise ValueError(
                    f"epochs and stages must be at least 1, got {self.epochs} and {self.stages}"
                )
            ends = {self.epochs * i // self.stages for i in range(1, self.stages)}
            equal = tuple(sorted(ends - {0}))
            self.fill(milestones=equal)
            if self.milestones != equal:
                raise ValueError(
                    "give --stages (a number of equal stages) or --milestones, not both"
                )
        if list(self.milestones) != sorted(set(self.milestones) & set(range(1, self.epochs))):
            raise ValueError(
                f"milestones must be increasing epochs between 1 and {self.epochs - 1} (the run "
                f"has {self.epochs} epochs), got {', '.join(map(str, self.milestones))}"
            )
