"""Dead slices of parameters whose unit is still there, and what needs it."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_structured.compact.labelling import OUTPUT, labelled
from optax_structured.compact.plan import Plan


@dataclasses.dataclass(frozen=True)
class Stuck:
    """Slices of one leaf that are zero while their unit cannot be cut.

    Args:
      path: of the leaf.
      axis: along which they lie.
      count: how many units.
      reason: another leaf in which the unit is alive, or what needs all units.
    """

    path: str
    axis: int
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} dead along axis {self.axis} of {self.path}: {self.reason}"


def stuck(plan: Plan, named: Sequence[tuple[str, Any]]) -> tuple[Stuck, ...]:
    """What tells a user which groups to choose.

    Slices of one entry (of a bias) and leaves that are gone altogether are no structure, and
    slices along axes of inputs or positions are no units: they are left out.
    """
    leaves = [np.asarray(leaf) for _, leaf in named]
    units, values = labelled(plan.program, [leaf.shape for leaf in leaves])
    blocks = [plan.kept[v] for v in plan.program.inputs[: len(leaves)]]
    alive: dict[int, str] = {}  # units -> a leaf that still has a slice of it
    dead: list[tuple[int, int, int]] = []  # leaf, axis, unit
    for i, (leaf, value) in enumerate(zip(leaves, values, strict=True)):
        kept = blocks[i]
        for k, axis in enumerate(value.axes):
            if axis.labels is None:
                continue
            other = tuple(j for j in range(leaf.ndim) if j != k)
            nonzero = (leaf != 0).any(axis=other)
            here = np.zeros(leaf.shape[k], bool)
            if kept is not None:
                here[kept[k]] = True
            structure = leaf.size > leaf.shape[k] and leaf.any()
            for label, lives, left in zip(axis.labels.tolist(), nonzero, here, strict=True):
                root = units.root(label)
                if lives and left:
                    alive.setdefault(root, named[i][0])
                elif not lives and structure:
                    dead.append((i, k, root))
    found: dict[tuple[int, int, str], set[int]] = collections.defaultdict(set)
    for i, k, root in dead:
        needed = units.why.get(root)
        if needed is not None and needed not in _PLACES:
            found[i, k, "the output has all of them" if needed == OUTPUT else _by(needed)].add(root)
        elif needed is None and root in alive:
            reason = f"coupled to {alive[root]}, where they are alive"
            found[i, k, reason].add(root)
    return tuple(Stuck(named[i][0], k, len(x), why) for (i, k, why), x in found.items())


def _by(primitive: str) -> str:
    return f"{primitive} reads all of them"


# What meets the axes of inputs and positions, which are no units.
_PLACES = frozenset(
    """add conv_general_dilated dot_general gather mul reshape scan select_n slice squeeze
    sub""".split()
)
