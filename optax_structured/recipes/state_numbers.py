"""How many numbers of state the published formulas count for one matrix."""

from collections.abc import Callable
from typing import NamedTuple


class Matrix(NamedTuple):
    """What the formulas know of one matrix."""

    size: int  # of the compressed axis
    length: int  # of the other
    rank: int  # kept of `size`
    rows: int  # the axis of the outputs, whichever is compressed

    @property
    def entries(self) -> int:
        return self.size * self.length

    @property
    def basis(self) -> int:
        return self.size * self.rank

    @property
    def moments(self) -> int:
        """Both of Adam, in the subspace."""
        return 2 * self.length * self.rank


class Numbers(NamedTuple):
    """How many numbers a method keeps of each kind."""

    moments: int = 0
    basis: int = 0
    other: int = 0  # norms, indices, factored moments, error buffers


Formula = Callable[[Matrix], Numbers]
