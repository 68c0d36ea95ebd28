"""A run on disk, beside its checkpoint: the exact configuration, tables of numbers."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

CONFIG = "config.json"

Config = TypeVar("Config")
Row = dict[str, Any]


def check_empty(folder: pathlib.Path) -> None:
    """Raises FileExistsError unless a new run can begin in this folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty: give another --out, or continue what is in it "
            f"with --resume {folder}"
        )


def begin(
    config: Any, folder: pathlib.Path, *, resume: bool, stop_after: int | None, unit: str
) -> None:
    """Makes the folder of a new run and writes its configuration; a resumed run has both.

    Raises:
      ValueError: `stop_after` below 1 `unit`.
      FileExistsError: a new run into a folder that is not empty.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"stop_after must be at least 1 {unit}, got {stop_after}")
    if not resume:
        check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder)


def save_config(config: Any, folder: pathlib.Path) -> None:
    """Writes a configuration, a dataclass, to `config.json`."""
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def stored_fields(folder: pathlib.Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
      FileNotFoundError: not a run folder.
      ValueError: the file is damaged.
    """
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not the configuration of a run ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not the configuration of a run: it holds no names")
    return fields


def load_config(folder: pathlib.Path, kind: type[Config]) -> Config:
    """The configuration of a run folder; raises as `stored_fields`."""
    fields = stored_fields(folder)
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except TypeError as error:
        raise ValueError(
            f"{folder / CONFIG} is not the configuration of a run ({error})"
        ) from error


def check_same(stored: Any, given: Mapping[str, Any], ignoring: Iterable[str] = ()) -> None:
    """Raises ValueError unless every option that was given is what the stored run has."""
    ours = dataclasses.asdict(stored)
    differing = [
        f"{key} is {ours[key]!r} there and {value!r} here"
        for key, value in given.items()
        if value is not None and key not in ignoring and ours[key] != value
    ]
    if differing:
        raise ValueError(
            f"a run is resumed with its own configuration: {'; '.join(differing)}; leave these "
            "options out, or start a new run with another --out"
        )


def write_table(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal names as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: pathlib.Path) -> list[Row]:
    """The rows of `write_table`; what looks like a number is one."""
    with open(path, newline="") as file:
        return [{name: _value(x) for name, x in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
