"""What a compiled program sends between devices, read off its text."""

import collections
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r" = (.*?) ([a-z][a-z\-]*?)(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|true|false)_computations?=\{?([^}]*?)(?:\}|, [a-z])")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"ROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_NAME = re.compile(r"%?([\w.\-]+)")
# What a device receives, in sizes of the result: each entry of a sum travels twice.
_TRAVELS = {
    "all-gather": 1,
    "all-reduce": 2,
    "all-to-all": 1,
    "collective-permute": 1,
    "reduce-scatter": 1,
}


class Traffic(NamedTuple):
    """Bytes that a device receives in one step, by kind of collective."""

    always: dict[str, float]
    at_most: dict[str, float]  # with the conditionals that some steps take, as refits are


def traffic(text: str) -> Traffic:
    """The collectives of a compiled program: loops by their turns, branches by the costlier.

    A loop whose turns depend on the data counts once.
    """
    computations, entry = computations_of(text)

    def of(name: str, branches: bool) -> dict[str, float]:
        total: dict[str, float] = collections.defaultdict(float)
        for line in computations.get(name, ()):
            operation = _OPERATION.search(line)
            if operation is None:
                continue
            result, kind = operation.groups()
            if kind == "conditional":
                sides = _NAME.findall(", ".join(_BRANCHES.findall(line)))
                found = [of(side, branches) for side in sides]
                if branches and found:
                    _add(total, max(found, key=lambda side: sum(side.values())), 1)
                continue
            if kind in _TRAVELS:
                total[kind] += _TRAVELS[kind] * _bytes(result)
            turns = _turns(line, computations) if kind == "while" else 1
            for called in _CALLED.findall(line):
                _add(total, of(called, branches), turns)
        return total

    return Traffic(dict(of(entry, False)), dict(of(entry, True)))


def _turns(loop: str, computations: dict[str, list[str]]) -> int:
    """As XLA says; in programs for TPUs, to what the condition compares a counter, from 0 on."""
    if said := _TURNS.search(loop):
        return int(said[1])
    condition = "\n".join(computations.get(_CONDITION.findall(loop)[0], ()))
    if bound := _BOUND.search(condition):
        value = re.search(rf"%?{re.escape(bound[1])} = [su]32\[\]\S* constant\((\d+)\)", condition)
        return int(value[1]) if value else 1
    return 1


def _add(total: dict[str, float], part: dict[str, float], times: int) -> None:
    for kind, size in part.items():
        total[kind] = total.get(kind, 0) + times * size


def _bytes(result: str) -> float:
    total = 0.0
    for kind, shape in _ARRAY.findall(result):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        entries = 1
        for side in filter(None, shape.split(",")):
            entries *= int(side)
        total += entries * bits / 8
    return total


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a compiled program, and the name of its entry."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            lines = found.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    return found, entry
