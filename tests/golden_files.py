"""Reads the golden files: what the published code does on fixed inputs.

A file says all that a replay needs, in its `meta` and in its arrays: the names and shapes of the
leaves, the settings, the number of steps. Layouts are torch's, a linear weight is (out, in) and a
convolution (out, in, kh, kw): elements are told by axes, so axes are translated, never numbers.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"
# Entries of `meta` that are not settings. All that is a string there is prose.
_STRUCTURE = ("hyperparameters", "steps", "leaves", "cases", "seed")


class Settings(Mapping):
    """The settings of a run; one that a replay does not read is an error, not a detail."""

    def __init__(self, name: str, values: dict[str, Any]):
        self.name, self._values = name, {k: v for k, v in values.items() if v is not None}
        self._unread = set(self._values)

    def __getitem__(self, key: str) -> Any:
        self._unread.discard(key)
        if key not in self._values:
            raise KeyError(f"{self.name} has no setting {key!r}, which its replay needs")
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def one_of(self, key: str, table: dict[Any, Any], default: Any = None) -> Any:
        """What a table has for the value of a setting."""
        value = self.get(key, default)
        if value not in table:
            raise ValueError(
                f"{self.name} has {key}={value!r}, for which its replay has nothing; it knows "
                f"{', '.join(map(repr, table))}"
            )
        return table[value]

    def must_be(self, **expected: Any) -> None:
        """Raises for a setting that a replay can take with one value only."""
        for key, value in expected.items():
            self.one_of(key, {value: value}, default=value)

    def pass_over(self, *keys: str) -> None:
        """For what does not change the result, such as how often the authors' solver iterates."""
        self._unread.difference_update(keys)

    def check_all_read(self) -> None:
        if self._unread:
            given = ", ".join(f"{key}={self._values[key]!r}" for key in sorted(self._unread))
            raise ValueError(
                f"{self.name} says {given}, which its replay does not read: teach it the setting"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Golden:
    name: str  # the stem of its file
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        leaves = self.meta.get("leaves", {})  # some files list the names alone
        for leaf, shape in leaves.items() if isinstance(leaves, dict) else ():
            if self.arrays[f"params0/{leaf}"].shape != tuple(shape):
                raise ValueError(f"{self.name} says that {leaf!r} has shape {shape}, and has not")

    @property
    def system(self) -> str:
        """The first word of what the file says it is."""
        return self.meta["system"].split()[0]

    @property
    def prose(self) -> str:
        """What the file says about layout, state and deviations."""
        return "\n".join(value for value in self.meta.values() if isinstance(value, str))

    def as_matrix(self, x: np.ndarray, name: str, axes: str) -> np.ndarray:
        """An array whose last two axes are these, by the letters that `layout` gives to its name.

        A layout says `a:(r,n) b:(m,r)`; what it does not name has the axes that are wanted.
        """
        said = re.search(rf"\b{name}\s*[:=][^;]*?\(([^()]*)\)", self.meta.get("layout", ""))
        letters = said[1].replace(" ", "").replace(",", "")[-2:] if said else axes
        if set(letters) != set(axes):
            raise ValueError(f"{self.name} says {name}:({said[1]}), and its replay knows {axes}")
        return x if letters == axes else np.swapaxes(x, -1, -2)

    def settings(self) -> Settings:
        beside = {
            key: value
            for key, value in self.meta.items()
            if key not in _STRUCTURE and not isinstance(value, str)
        }
        return Settings(self.name, self.meta.get("hyperparameters", {}) | beside)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return self.meta["hyperparameters"]

    @property
    def start(self) -> dict[str, np.ndarray]:
        return self.leaves("params0")

    def leaves(self, key: str) -> dict[str, np.ndarray]:
        """`{leaf: array}` of the arrays stored as `key/leaf`; with a step axis where it has one."""
        prefix = key + "/"
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def steps(self, key: str) -> list[dict[str, np.ndarray]]:
        return [{k: v[t] for k, v in self.leaves(key).items()} for t in range(self.meta["steps"])]


@functools.cache
def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Golden(name, json.loads(str(arrays.pop("meta"))), arrays)


def names(*prefixes: str) -> list[str]:
    """The stems of the files that begin like one of these."""
    return sorted(p.stem for p in FOLDER.glob("*.npz") if p.stem.startswith(prefixes))
