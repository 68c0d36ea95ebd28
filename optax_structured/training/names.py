"""Names that users choose from, and words."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

# Leaves of the language model that stay full rank: the others are matrices of attention or the MLP.
PLAIN = r"embed|head|norm"


def one_of(names: Iterable[str]) -> str:
    """The choices, for a line of help."""
    return f"One of {', '.join(names)}"


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `name` is known: lists all names, and the nearest."""
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(names)}{hint}")


def chosen(kind: str, name: str, known: Mapping[str, Value]) -> Value:
    """What `known` has under this name; raises as `check_known`."""
    check_known(kind, name, known)
    return known[name]


def counted(number: int, noun: str) -> str:
    """A number of things: 1 layer, 2 layers."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
