"""Which slices belong to one unit: labels along the axes of every value, merged where they meet."""

import dataclasses
from typing import NamedTuple

import numpy as np

from optax_structured.compact.forward import Source
from optax_structured.compact.sets import Shape

STAYS = 0  # the label of all slices that cannot go
Labels = np.ndarray | None  # of the slices along one axis; None: it follows any other axis


class Axis(NamedTuple):
    """An axis of a value."""

    labels: Labels
    zero: bool = False  # the slices of a dead unit are exactly zero


class Value(NamedTuple):
    """What is known of a value."""

    axes: tuple[Axis, ...]
    source: Source
    number: float | None = None  # of a constant that is the same everywhere

    def is_zero(self, axis: int) -> bool:
        """Whether the slices of a dead unit are zero along this axis."""
        return self.axes[axis].zero or self.number == 0


class Read(NamedTuple):
    """A sum over units."""

    labels: np.ndarray
    by_params: bool  # over products with a parameter that has a slice for each unit
    zero: bool  # what is read is zero where a unit is dead


class Site(NamedTuple):
    """A reshape that the units of several axes meet in, or that takes their axis apart."""

    candidates: int  # among which axes one keeps its units
    labels: np.ndarray  # of the axis that was chosen


@dataclasses.dataclass(eq=False)
class Units:
    """Labels and what becomes of them.

    Args:
      choices: for each `Site` in order, the axis that keeps its units.
    """

    choices: dict[int, int]
    sites: list[Site] = dataclasses.field(default_factory=list)
    reads: list[Read] = dataclasses.field(default_factory=list)
    read: set[int] = dataclasses.field(default_factory=set)  # of kernels, that sums go over
    written: set[int] = dataclasses.field(default_factory=set)  # of kernels, that results have
    parents: list[int] = dataclasses.field(default_factory=lambda: [STAYS])
    why: dict[int, str] = dataclasses.field(default_factory=dict)  # roots stay: what needs them
    doing: str = ""  # the primitive that is looked at

    def new(self, count: int) -> np.ndarray:
        """Labels that are not used yet."""
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, label: int) -> int:
        """The label that stands for all that were merged with this one."""
        while self.parents[label] != label:
            self.parents[label] = label = self.parents[self.parents[label]]
        return label

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """The roots of labels; `STAYS` of those that cannot go."""
        found = (self.root(int(label)) for label in labels.ravel())
        return np.array([STAYS if root in self.why else root for root in found], int)

    def merge(self, first: Labels, second: Labels) -> Labels:
        """Slices in the same place become those of one unit."""
        if first is None or second is None:
            return second if first is None else first
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            if low == high:
                continue
            if low == STAYS:
                self.why.setdefault(high, self.doing)
                continue
            self.parents[high] = low
            if high in self.why:
                self.why.setdefault(low, self.why.pop(high))
        return first

    def stay(self, axis: Axis) -> None:
        """None of these slices may go."""
        if axis.labels is not None:
            self.merge(axis.labels, np.zeros_like(axis.labels))

    def may_go(self, axis: Axis) -> bool:
        """Whether any of these slices may go."""
        return axis.labels is not None and bool((self.roots(axis.labels) != STAYS).any())

    def choose(self, axes: list[Axis]) -> int:
        """The axis that keeps its units, of several; those of the others stay."""
        site = len(self.sites)
        place = self.choices.get(site, 0) if len(axes) > 1 else 0
        place = min(place, len(axes) - 1)
        for k, axis in enumerate(axes):
            if k != place:
                self.stay(axis)
        labels = axes[place].labels
        assert labels is not None
        self.split(len(axes), labels)
        return place

    def split(self, candidates: int, labels: np.ndarray) -> None:
        """Notes a `Site` whose axis was taken apart."""
        self.sites.append(Site(candidates, np.unique(self.roots(labels))))

    def is_kept(self, site: Site) -> bool:
        """Whether the units of a site can all go, each by itself."""
        roots = np.unique(self.roots(site.labels))
        return len(roots) == len(site.labels) and STAYS not in roots


def free(shape: Shape, source: Source, number: float | None = None) -> Value:
    """A value whose axes follow any other: of constants, or the same everywhere."""
    return Value(tuple(Axis(None) for _ in shape), source, number)


def fixed(shape: Shape) -> Value:
    """A value of the inputs of which nothing can go."""
    return Value(tuple(Axis(np.zeros(n, int)) for n in shape), Source.INPUTS)


def of_leaf(units: Units, shape: Shape) -> Value:
    """A parameter: each slice along each axis may go, and is zero then."""
    axes = (Axis(units.new(n), True) if n > 1 else Axis(None) for n in shape)
    return Value(tuple(axes), Source.PARAMS)
