"""The exact configuration of a run of the task `lm`."""

import dataclasses
from typing import Self

from optax_structured.training import config
from optax_structured.training.config import check_count, option
from optax_structured.training.lm import recipes
from optax_structured.training.lm import text as texts
from optax_structured.training.names import check_known, chosen, one_of
from optax_structured.training.state_bits import default_state_bits
from optax_structured.trees.checks import check_nonnegative, check_positive

EVALUATIONS = 10
_COUNTS = ("width", "layers", "heads", "sequence", "batch_size", "steps", "evaluate_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Everything that decides the numbers of a run; what is None the recipe does not have, or
    chooses itself."""

    task: str = "lm"
    recipe: str = "galore"
    text: str = option("A text file, or that of Python itself", texts.DEFAULT)
    text_sha256: str
    train_bytes: int
    width: int = option("Of the residual stream", 128)
    layers: int = option("Transformer blocks", 2)
    heads: int = option("Of attention", 4)
    stacked: bool = option("All layers as one leaf per kind, (layers, m, n), under a scan", False)
    sequence: int = option("Bytes of context", 128)
    steps: int = option("Of the run", 2000)
    scheduled_steps: int | None = None  # of the schedule; after them the rate stays at its last
    evaluate_every: int = option("Steps between evaluations; default a tenth of all")
    rank: int | None = option("Default a quarter of the width", own=True)
    period: int | None = option("Steps between refits; default 50, or 1 as published", own=True)
    scale: float | None = option("Of the low-rank part; default as published", own=True)
    weight_decay: float = option("Decoupled", 0.0, own=True)
    clip: float = option("Largest norm of the gradient, 0 for none", 0.0, own=True)
    projector: str | None = option(one_of(recipes.PROJECTORS), own=True)
    refresh: str | None = option(one_of(recipes.REFRESHES), own=True)
    transport: str | None = option(one_of(recipes.TRANSPORTS), own=True)

    def __post_init__(self) -> None:
        recipe = chosen("recipe", self.recipe, recipes.RECIPES)
        self.fill(
            batch_size=8,
            learning_rate=recipe.learning_rate,
            state_bits=default_state_bits(self.recipe),
            scheduled_steps=self.steps,
            evaluate_every=max(1, self.steps // EVALUATIONS),
            scale=recipe.scale,
        )
        if recipe.period:
            self.fill(rank=recipe.rank or max(1, self.width // 4), period=recipe.period)
        super().__post_init__()
        for name in _COUNTS + (("rank", "period") if recipe.period else ()):
            check_count(name, getattr(self, name))
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of twice the {self.heads} heads: rotary "
                "positions turn pairs of entries of a head"
            )
        if self.sequence >= self.train_bytes:
            raise ValueError(
                f"sequence {self.sequence} is longer than the {self.train_bytes} bytes of the "
                "training text; give a longer --text or a smaller --sequence"
            )
        check_nonnegative("weight_decay", self.weight_decay)
        check_nonnegative("clip", self.clip)
        for name in ("rank", "period", *recipes.PARTS):
            if recipe.period is None and getattr(self, name) is not None:
                raise ValueError(
                    f"recipe {self.recipe!r} keeps full rank and has no {name}; leave --{name} out"
                )
        for part, known in recipes.PARTS.items():
            if (name := getattr(self, part)) is not None:
                check_known(part, name, known)
        if self.scale is not None:
            if recipe.scale is None:
                raise ValueError(f"recipe {self.recipe!r} has no scale; leave --scale out")
            check_positive("scale", self.scale)

    def extended(self, steps: int) -> Self:
        """The rate stays at its last value."""
        return dataclasses.replace(self, steps=steps)
