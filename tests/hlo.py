"""What a compiled program communicates, and when."""

import functools
import math
import re

from optax_structured.planning.collectives import computations_of

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_OPERATION = re.compile(r" = (.*?) ([a-z][a-z\-]*?)(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_SIDES = re.compile(r"(?:branch_computations|true_computation)=(.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def steady_collectives(text):
    """The communication that runs at every step, outside all conditionals: lines of HLO."""
    computations, entry = computations_of(text)
    seen, todo, found = set(), [entry], []
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations[name]:
            operation = _OPERATION.search(line)
            if operation is None or operation[2] == "conditional":
                continue
            if operation[2] in COLLECTIVES:
                found.append(line)
            todo += _CALLED.findall(line)
    return found


def collectives_in_loops(text):
    """The communication of each turn of a loop: lines of HLO."""
    computations, _ = computations_of(text)
    todo, seen = re.findall(r"(?:body|condition)=%?([\w.\-]+)", text), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            called = set().union(*map(_NAME.findall, computations[name]))
            todo += called & computations.keys()
    return all_collectives("\n".join(line for name in seen for line in computations[name]))


def beyond_flags(lines):
    """Those that carry more than a number; whether a leaf is finite is a number, for which
    compilers of accelerators send one message for all leaves."""
    return [line for line in lines if any(math.prod(shape) > 1 for shape in shapes_of(line))]


def all_collectives(text):
    """All communication of a compiled program."""
    found = ((line, _OPERATION.search(line)) for line in text.splitlines())
    return [line for line, operation in found if operation and operation[2] in COLLECTIVES]


def unavoidable(text, word):
    """Whether a line with this word runs at every step, whichever sides the conditionals take."""
    computations, entry = computations_of(text)

    @functools.cache
    def runs(name):
        return any(map(line_runs, computations[name]))

    def line_runs(line):
        operation = _OPERATION.search(line)
        if operation and operation[2] == "conditional":
            (sides,) = _SIDES.findall(line)
            return all(map(runs, _NAME.findall(sides)))
        return word in line or any(map(runs, _CALLED.findall(line)))

    return runs(entry)


def shapes_of(line):
    """The shapes of the results of one line of HLO."""
    results = _SHAPE.findall(_OPERATION.search(line)[1])
    return [tuple(map(int, filter(None, shape.split(",")))) for shape in results]
