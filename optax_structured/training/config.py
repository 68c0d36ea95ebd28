"""The exact configuration of a run: made once, checked once, stored with the run."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

from optax_structured.training.state_bits import HELP, codec_of, in_words
from optax_structured.trees.checks import check_positive


def option(text: str, default: Any = None, *, own: bool = False, said: str = "") -> Any:
    """A field that is an option of the command.

    Args:
      text: its line of help.
      default: None where it depends on other fields: they know it by then.
      own: whether it is a hyperparameter of a recipe, which `compare` may set for each.
      said: the default in words, where it is too long for a narrow terminal.
    """
    shown = "" if default in (None, False) else f"; default {said or default}"
    return dataclasses.field(default=default, metadata={"help": f"{text}{shown}.", "own": own})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the numbers of a run, with no default left open once it is made."""

    task: str
    recipe: str
    learning_rate: float = option("Default as published", own=True)
    batch_size: int = option("Images or sequences a step; default 32 (digits), 128, or 8 (lm)")
    state_bits: int = option(HELP)
    seed: int = option("Of weights and order of data", 0)

    def __post_init__(self) -> None:
        codec_of(self.state_bits)
        check_positive("learning_rate", self.learning_rate)

    @abc.abstractmethod
    def extended(self, length: int) -> Self:
        """The configuration of the same run, continued to another length."""

    def fill(self, **defaults: Any) -> None:
        """Gives the fields that are None their values, as a class does before its own checks."""
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field[Any]]:
        """The fields that are options."""
        return {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}

    @classmethod
    def own(cls) -> list[str]:
        """The options that are hyperparameters of a recipe."""
        return [name for name, field in cls.options().items() if field.metadata["own"]]

    def settings(self) -> str:
        """What a recipe has of its own but its learning rate, in words."""
        found = {name: getattr(self, name) for name in self.own() if name != "learning_rate"}
        listed = [
            value if isinstance(value, str) else f"{name.replace('_', ' ')} {value:g}"
            for name, value in found.items()
            if value
        ]
        return ", ".join(filter(None, (*listed, in_words(self.state_bits))))


def given_only(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, which counts as not given."""
    return {name: value for name, value in given.items() if value is not None}


def check_same(stored: Config, given: Mapping[str, Any], ignoring: Iterable[str] = ()) -> None:
    """Raises ValueError unless every option that was given is what the stored run has."""
    ours = dataclasses.asdict(stored)
    differing = [
        f"{key} is {ours[key]!r} there and {value!r} here"
        for key, value in given_only(given).items()
        if key not in ignoring and ours[key] != value
    ]
    if differing:
        raise ValueError(
            f"a run is resumed with its own configuration: {'; '.join(differing)}; leave these "
            "options out, or start a new run with another --out"
        )


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
