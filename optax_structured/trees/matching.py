"""Which pattern takes which path, and whether every pattern does something."""

import difflib
import functools
import heapq
import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Matches(NamedTuple):
    """Patterns against paths."""

    owners: tuple[int | None, ...]  # of each path: the first pattern that matches it
    found: tuple[tuple[int, ...], ...]  # of each pattern: the paths that it matches


@functools.lru_cache(maxsize=256)
def match(patterns: tuple[str, ...], paths: tuple[str, ...]) -> Matches:
    """Every pattern searched in every path."""
    searches = [re.compile(pattern).search for pattern in patterns]
    found = tuple(tuple(at for at, path in enumerate(paths) if f(path)) for f in searches)
    owners: list[int | None] = [None] * len(paths)
    for i, matched in reversed([*enumerate(found)]):
        for at in matched:
            owners[at] = i
    return Matches(tuple(owners), found)


def check_used(pairs: Sequence[tuple[str, Any]], paths: Sequence[str], matches: Matches) -> None:
    """Raises ValueError for a pattern that does nothing.

    It matches no path, or earlier patterns take all that it matches and give another value. What
    matches everything may stand last, as a default.
    """
    for i, (pattern, value) in enumerate(pairs):
        matched = matches.found[i]
        if not matched:
            nearest = ", ".join(repr(path) for path in _nearest(pattern, paths))
            raise ValueError(
                f"rules: pattern {pattern!r} matches no parameter path; the nearest paths are "
                f"{nearest}; correct the pattern or remove it"
            )
        if len(matched) == len(paths) or any(matches.owners[at] == i for at in matched):
            continue
        for at in matched:
            earlier, other = pairs[matches.owners[at]]  # type: ignore[index]
            if not same(other, value):
                raise ValueError(
                    f"rules: pattern {pattern!r} gets no leaf, because earlier patterns match "
                    f"everything that it matches: {earlier!r} takes {paths[at]!r}; put {pattern!r} "
                    "before it, or remove it"
                )


def same(a: Any, b: Any) -> bool:
    """Whether two values of a table are equal."""
    return a is b or (type(a) is type(b) and bool(a == b))


def _nearest(pattern: str, paths: Sequence[str]) -> list[str]:
    """The three paths most like a pattern, as wholes or by one of their components."""
    words = [pattern, *re.findall(r"\w+", pattern)]

    def likeness(path: str) -> float:
        parts = (path, *path.split("/"))
        return max(difflib.SequenceMatcher(None, w, p).ratio() for w in words for p in parts)

    return heapq.nlargest(3, paths, key=likeness)
