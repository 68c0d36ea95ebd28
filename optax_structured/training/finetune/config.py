"""The exact configuration of a run of the task `finetune`."""

import dataclasses
from typing import Self

from optax_structured.training import config
from optax_structured.training.config import check_count, option
from optax_structured.training.finetune import methods
from optax_structured.trees.checks import check_nonnegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Everything that decides the numbers of a run."""

    task: str = "finetune"
    recipe: str = "lora"
    epochs: int = option("Passes over the images", 20)
    pretrain_epochs: int = option("Passes over the digits 0 to 4 before", 20)
    rank: int | None = option("Of each adapter; default 4", own=True)
    strength: float | None = option("Weight of the penalty of each rank, for lora_prox", own=True)
    train_size: int  # images

    def __post_init__(self) -> None:
        method = methods.find(self.recipe)
        if method.rank is None and self.rank is not None:
            raise ValueError(f"recipe {self.recipe!r} has no rank; leave --rank out")
        if not method.strength and self.strength:
            raise ValueError(f"recipe {self.recipe!r} has no penalty; leave --strength out")
        self.fill(
            batch_size=32,
            learning_rate=method.learning_rate,
            state_bits=32,
            rank=method.rank,
            strength=method.strength,
        )
        super().__post_init__()
        if self.state_bits != 32:
            raise ValueError("the state of an adapter is small: leave --state-bits out")
        for name in ("epochs", "pretrain_epochs", "batch_size") + ("rank",) * bool(method.rank):
            check_count(name, getattr(self, name))
        check_nonnegative("strength", self.strength)
        if self.batch_size > self.train_size:
            raise ValueError(
                f"batch_size must be at most the {self.train_size} training images, got "
                f"{self.batch_size}"
            )

    def extended(self, epochs: int) -> Self:
        """There is no schedule: the run just goes on."""
        return dataclasses.replace(self, epochs=epochs)
