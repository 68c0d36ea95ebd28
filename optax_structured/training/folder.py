"""A run on disk, beside its checkpoint: the exact configuration, tables of numbers."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

CONFIG, _PARTIAL = "config.json", ".part"

Config = TypeVar("Config")
Row = dict[str, Any]


def quoted(folder: pathlib.Path) -> str:
    """The folder as a shell takes it."""
    return shlex.quote(str(folder))


def check_empty(folder: pathlib.Path) -> None:
    """Raises FileExistsError unless a new run can begin in this folder."""
    if folder.exists() and (not folder.is_dir() or any(map(_is_whole, folder.iterdir()))):
        raise FileExistsError(
            f"{folder} exists and is not empty: give another --out, or continue what is in it "
            f"with --resume {quoted(folder)}"
        )


def _is_whole(path: pathlib.Path) -> bool:
    """Whether this is not what `replacing` leaves when it is killed."""
    return path.suffix != _PARTIAL


def save_config(config: Any, folder: pathlib.Path) -> None:
    """Writes a configuration, a dataclass, to `config.json`."""
    with replacing(folder / CONFIG) as file:
        file.write((json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode())


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
    except ValueError as error:  # not JSON, or not text
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


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that replaces the one at `path` as a whole, or not at all."""
    partial = path.with_name(path.name + _PARTIAL)
    with open(partial, "wb") as file:
        yield file
    os.replace(partial, path)


def write_table(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal names as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[-1], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


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
