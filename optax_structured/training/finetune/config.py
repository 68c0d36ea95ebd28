"""The exact configuration of a run of the task `finetune`."""

import dataclasses
from typing import Self

from optax_structured.training import config
from optax_structured.training.config import check_count, option
from optax_structured.training.finetune import methods
from optax_structured.training.names import check_known, chosen, one_of
from optax_structured.trees.checks import check_nonnegative

DATA = ("digits", "verses")
LAYERS, PRETRAIN_EPOCHS, SEQUENCE, VERSES = 6, 20, 40, 800
# What has a meaning for one kind of data only, and its default there.
_OWN = {
    "digits": {"pretrain_epochs": PRETRAIN_EPOCHS},
    "verses": {"layers": LAYERS, "sequence": SEQUENCE, "verses": VERSES},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Everything that decides the numbers of a run."""

    task: str = "finetune"
    recipe: str = "lora"
    data: str = option(one_of(DATA), "digits")
    text: str | None = option("File of the verses; default what the command `bible` prints")
    text_sha256: str
    train_size: int  # images or verses
    epochs: int | None = option("Passes over the data; default 20, or 1 for verses")
    scheduled_epochs: int | None = None  # of the schedule; after them the rate stays at its last
    pretrain_epochs: int | None = option("Passes over the digits 0 to 4 before; default 20")
    verses: int | None = option("Of each of six parts, a quarter for testing; default 800")
    sequence: int | None = option("Tokens of a verse; default 40")
    layers: int | None = option("Of the encoder that are adapted, the last ones; default all, 6")
    rank: int | None = option("Of each adapter; default 4, or 8 for verses", own=True)
    strength: float | None = option(
        "Penalty of each rank, a share of a step of Adam; default 0.05, or 0.2 for verses", own=True
    )

    def __post_init__(self) -> None:
        method = chosen("recipe", self.recipe, methods.METHODS)
        check_known("data", self.data, DATA)
        if not method.takes("rank") and self.rank is not None:
            raise ValueError(f"recipe {self.recipe!r} has no rank; leave --rank out")
        if not method.takes("strength") and self.strength:
            raise ValueError(f"recipe {self.recipe!r} has no penalty; leave --strength out")
        for data, own in _OWN.items():
            for name in own:
                if data != self.data and getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name.replace('_', '-')} has a meaning for --data {data} only, not "
                        f"for {self.data}; leave it out"
                    )
        start = method.starts[self.data]
        verses = self.data == "verses"
        self.fill(
            batch_size=16 if verses else 32,
            epochs=1 if verses else 20,
            learning_rate=start.learning_rate,
            state_bits=32,
            rank=start.rank,
            strength=start.strength,
            **_OWN[self.data],
        )
        self.fill(scheduled_epochs=self.epochs)
        super().__post_init__()
        if self.state_bits != 32:
            raise ValueError("the state of an adapter is small: leave --state-bits out")
        for name in ("epochs", "batch_size", *_OWN[self.data]) + ("rank",) * bool(start.rank):
            check_count(name, getattr(self, name))
        check_nonnegative("strength", self.strength)
        if (self.layers or 0) > LAYERS:
            raise ValueError(f"the encoder has {LAYERS} layers, got --layers {self.layers}")
        if self.batch_size > self.train_size:
            raise ValueError(
                f"batch_size must be at most the {self.train_size} that are trained on, got "
                f"{self.batch_size}"
            )

    def extended(self, epochs: int) -> Self:
        """The rate stays at its last value."""
        return dataclasses.replace(self, epochs=epochs)
