"""Plain text tables of leaves: aligned columns, and one row for the leaves that are alike."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_NUMBER = re.compile(r"\d+")


def kinds(items: Iterable[T], alike: Callable[[T], Hashable]) -> list[tuple[str, list[T]]]:
    """Items with a `path`, put together where paths differ in numbers only and `alike` is equal.

    `(name, items)` pairs in the order of first appearance. The name of a single item is its path,
    that of several has the range of the numbers in which their paths differ, and says how many.

    >>> from types import SimpleNamespace as Leaf
    >>> leaves = [Leaf(path=f"layers/{i}/kernel") for i in range(12)] + [Leaf(path="head")]
    >>> [(name, len(of_kind)) for name, of_kind in kinds(leaves, lambda leaf: None)]
    [('layers/{0..11}/kernel (12 leaves)', 12), ('head', 1)]
    """
    found: dict[Any, list[T]] = {}
    for item in items:
        path: str = item.path  # type: ignore[attr-defined]
        found.setdefault((_NUMBER.sub("*", path), alike(item)), []).append(item)
    return [(_name([x.path for x in same]), same) for same in found.values()]  # type: ignore[attr-defined]


def _name(paths: Sequence[str]) -> str:
    """One name for paths that differ in numbers only."""
    if len(paths) == 1:
        return paths[0]
    columns = zip(*(_NUMBER.findall(path) for path in paths), strict=True)
    numbers = iter([_one_or_range(column) for column in columns])
    return f"{_NUMBER.sub(lambda _: next(numbers), paths[0])} ({len(paths)} leaves)"


def _one_or_range(numbers: Sequence[str]) -> str:
    if len(set(numbers)) == 1:
        return numbers[0]
    values = sorted(set(map(int, numbers)))
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}" if len(values) <= 4 else "*"


def aligned(
    rows: Sequence[Sequence[str]], numbers: Iterable[int] = (), width: int | None = None
) -> str:
    """Rows of cells as lines of equal columns.

    Args:
      rows: cells, the heading first.
      numbers: the columns to be aligned at the right.
      width: of the screen: where a line would be longer, the first cells, which are names, get
        lines of their own. None for as wide as it takes.

    >>> print(aligned([("path", "bytes"), ("kernel", "1,024"), ("bias", "16")], numbers=[1]))
    path    bytes
    kernel  1,024
    bias       16
    >>> print(aligned([("path", "bytes"), ("attention/kernel", "1,024")], [1], width=20))
    path
      bytes
    attention/kernel
      1,024
    """
    right = set(numbers)
    lines = _lines(rows, right)
    if width is None or max(map(len, lines)) <= width:
        return "\n".join(lines)
    others = _lines([row[1:] for row in rows], {i - 1 for i in right})
    pairs = ((row[0], f"  {line}") for row, line in zip(rows, others, strict=True))
    return "\n".join(line for pair in pairs for line in pair if line.strip())


def _lines(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(cells)
        ).rstrip()

    return [line(row) for row in rows]
