"""The exact configuration of a language-model run: made once, checked once, stored with it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from optax_structured.checks import check_nonnegative, check_positive
from optax_structured.training import folder
from optax_structured.training.lm import recipes
from optax_structured.training.lm.text import DEFAULT, Text
from optax_structured.training.names import check_known
from optax_structured.training.state_bits import codec_of, default_state_bits

EVALUATIONS = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run; None is what the recipe itself uses."""

    text: str  # a name or a path, which may differ between a run and its continuation
    text_origin: str
    text_sha256: str
    width: int
    layers: int
    heads: int
    stacked: bool  # all layers in one leaf a matrix kind, (layers, m, n)
    sequence: int  # bytes of context
    batch_size: int  # sequences a step
    steps: int
    evaluate_every: int  # steps from one evaluation of the held-out text to the next
    recipe: str
    rank: int | None  # None: the recipe has no low-rank part
    period: int | None
    scale: float | None
    projector: str | None
    refresh: str | None
    transport: str | None
    learning_rate: float  # the peak
    weight_decay: float
    clip: float  # largest norm of the whole gradient; 0: off
    seed: int
    task: str = "lm"
    state_bits: int = 32  # of an entry of a moment; runs from before the option have 32

    def __post_init__(self) -> None:
        recipe = recipes.find(self.recipe)
        codec_of(self.state_bits)
        for name in (
            "width",
            "layers",
            "heads",
            "sequence",
            "batch_size",
            "steps",
            "evaluate_every",
        ):
            _check_count(name, getattr(self, name))
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of twice the {self.heads} heads: rotary "
                "positions turn pairs of entries of a head"
            )
        check_positive("learning_rate", self.learning_rate)
        check_nonnegative("weight_decay", self.weight_decay)
        check_nonnegative("clip", self.clip)
        for name in ("rank", "period", *recipes.PARTS):
            if not recipe.low_rank and getattr(self, name) is not None:
                raise ValueError(
                    f"recipe {self.recipe!r} keeps full rank and has no {name}; leave --{name} out"
                )
        for part, known in recipes.PARTS.items():
            if (chosen := getattr(self, part)) is not None:
                check_known(part, chosen, known)
        if recipe.scale is None and self.scale is not None:
            raise ValueError(f"recipe {self.recipe!r} has no scale; leave --scale out")
        if self.scale is not None:
            check_positive("scale", self.scale)
        if recipe.low_rank:
            _check_count("rank", self.rank)
            _check_count("period", self.period)

    @property
    def tokens_a_step(self) -> int:
        """Bytes that are predicted in one step."""
        return self.batch_size * self.sequence


def load(path: pathlib.Path) -> Config:
    """The configuration of a run folder; raises as `folder.stored_fields`."""
    return folder.load_config(path, Config)


def make(given: Mapping[str, Any], text: Text) -> Config:
    """A complete configuration from the options that were given, the rest by default.

    Args:
      given: fields of `Config`; None counts as not given.
      text: what to train on.

    Raises:
      ValueError: an option out of range, or two that contradict each other.
    """
    given = {key: value for key, value in given.items() if value is not None}
    recipe = recipes.find(given.get("recipe", "galore"))
    width, steps = given.get("width", 128), given.get("steps", 2000)
    low_rank = {"rank": recipe.rank or max(1, width // 4), "period": recipe.period}
    chosen: dict[str, Any] = {
        "text": DEFAULT,
        "text_origin": text.origin,
        "text_sha256": text.digest,
        "width": width,
        "layers": 2,
        "heads": 4,
        "stacked": False,
        "sequence": 128,
        "batch_size": 8,
        "steps": steps,
        "evaluate_every": max(1, steps // EVALUATIONS),
        "recipe": "galore",
        **(low_rank if recipe.low_rank else {"rank": None, "period": None}),
        "scale": recipe.scale,
        **dict.fromkeys(recipes.PARTS),
        "learning_rate": recipe.learning_rate,
        "weight_decay": 0.0,
        "clip": 0.0,
        "seed": 0,
        "state_bits": default_state_bits(given.get("recipe", "galore")),
        **given,
    }
    config = Config(**chosen)
    if config.sequence >= len(text.train):
        raise ValueError(
            f"sequence {config.sequence} is longer than the {len(text.train)} bytes of the "
            "training text; give a longer --text or a smaller --sequence"
        )
    return config


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
