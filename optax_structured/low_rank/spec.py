"""What is static about the low-rank treatment of a leaf."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from optax_structured.low_rank.refresh import Refresh
from optax_structured.low_rank.residuals import ErrorFeedback, NormScaled, Residual
from optax_structured.low_rank.transports import Transport, default_transport, stores_matrix
from optax_structured.projectors.base import Projector, check_rank, matrix_frame
from optax_structured.projectors.frames import Frame
from optax_structured.quantization.affine import Affine
from optax_structured.trees import Axes, Rules, as_rules

_JUDGED = 1024  # entries of the smallest leaf that is held to what it saves


@dataclasses.dataclass(frozen=True)
class LowRank:
    r"""How a leaf is projected: a frozen record, by itself or as a value of `rules`.

    Whatever is None is chosen by the recipe, or by `low_rank_projection`.

    Args:
      rank: r, how many directions of the compressed axis are kept, at least 1; a quarter of the
        width pre-trains well, 4 to 16 fine-tune. A leaf whose basis and two moments would take
        more than plain Adam's (from a rank of two thirds of a square matrix on) stays plain, and
        is an error where a rule names it. For `Tucker`, also one rank an axis, or the fraction of
        the entries to keep.
      period: steps between refits, at least 1; 200, 50 to 1000.
      axes: matrix view of the leaf and the side that is compressed; axes that are not named are
        batch axes, one subspace each (scan-stacked layers, heads).
      projector: where the basis comes from.
      refresh: when a leaf is fitted again.
      residual: what becomes of the part outside the subspace.
      transport: what happens to the inner state when the basis changes. None is what suits the
        projector: `Rotate` between subsets of one fixed basis, else `Keep`.
      dtype: of the operands of the two products with the basis, such as "bfloat16"; they add up in
        float32 in any case. None is that of the leaf, float32 at least.
      codec: stores the basis in fewer bits, `Affine(bits=4)` in 4 bits per entry. It is decoded
        at each step and not made orthonormal again: at 4 bits :math:`\|P^\top P - I\|` is about
        0.2. None is floating point.
      one_by_one: fit and multiply the matrices of a stack one after the other, so that a device
        holds one whole basis at a time. `choose_sides` says so where matrices are sharded and the
        stack is not; on one device it is slower.

    Raises:
      TypeError, ValueError: a rank or period out of range, or a part of the wrong kind.

    Example:
      >>> import optax_structured as oxs
      >>> oxs.LowRank(rank=128, period=200, axes=oxs.Axes(side="large")).rank
      128
    """

    rank: Any
    period: int | None = None
    axes: Axes = Axes()  # noqa: RUF009  (frozen)
    projector: Projector | None = None
    refresh: Refresh | None = None
    residual: Residual | None = None
    transport: Transport | None = None
    dtype: str | None = None
    codec: Affine | None = None
    one_by_one: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, tuple | float):
            check_rank(self.rank)
        if self.period is not None:
            _check_period(self.period)
        kinds = {
            "axes": Axes,
            "projector": Projector,
            "refresh": Refresh,
            "residual": Residual,
            "transport": Transport,
            "codec": Affine,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not (value is None and name != "axes" or isinstance(value, kind)):
                raise TypeError(
                    f"LowRank(..., {name}=...) takes {kind.__name__} objects, got {value!r}"
                )
        if self.dtype is not None:
            _check_dtype(self.dtype)
        if self.projector is not None:
            for part in (self.refresh, self.residual, self.transport):
                if part is not None:
                    part.check(self.projector)
        if self.codec is not None:
            _check_codec(self)

    def __repr__(self) -> str:
        """Without what is left open, so that a table of rules can be read."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        said = {name: value for name, value in said.items() if value not in (None, False, Axes())}
        return f"LowRank({', '.join([repr(self.rank), *(f'{n}={v!r}' for n, v in said.items())])})"

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless a leaf of this shape can be projected, at less than its cost.

        The state of a leaf must not exceed the two moments of plain Adam. Leaves of fewer than 1024
        entries are not judged: what they take does not matter, and full rank is how one compares
        an optimizer with another on a small example.
        """
        if math.prod(shape) == 0:
            raise ValueError(f"a leaf of shape {tuple(shape)} has no entries to project")
        if not self._known:
            self.axes.check(shape)
            return
        frame, adam = self.frame(shape), 2 * math.prod(shape)
        if frame.numbers > adam >= 2 * _JUDGED:
            raise ValueError(
                f"rank {frame.rank} {_view(frame)} takes {frame.numbers:,} numbers of state, plain "
                f"Adam {adam:,}; lower the rank, name the axes of its inputs and outputs "
                "(presets.low_rank does), or leave it plain (None)"
            )

    def fitted(self, shape: Sequence[int]) -> "LowRank":
        """This record for a leaf of this shape: its rank is what is really kept."""
        return dataclasses.replace(self, rank=self.frame(shape).rank) if self._known else self

    def shown(self, shape: Sequence[int]) -> str:
        """What tables print: the record, and the matrices where the leaf is not one as it is."""
        as_it_is = len(shape) == 2 and self.axes.matrix_shape(shape) == tuple(shape)
        view = "" if as_it_is or not self._known else f" {_view(self.frame(shape))}"
        return f"{self.fitted(shape)!r}{view}"

    @property
    def _known(self) -> bool:
        """Whether the rank is that of any projector, or of one that is given."""
        return self.projector is not None or isinstance(self.rank, int)

    def completed(self, **parts: Any) -> "LowRank":
        """This record with what is None taken from `parts`."""
        missing = {name: part for name, part in parts.items() if getattr(self, name) is None}
        whole = dataclasses.replace(self, **missing)
        if whole.transport is None and whole.projector is not None:
            whole = dataclasses.replace(whole, transport=default_transport(whole.projector))
        return whole

    def frame(self, shape: Sequence[int]) -> Frame:
        """The view of one leaf; of any projector of one matrix as long as none is given."""
        view = matrix_frame if self.projector is None else self.projector.frame
        return view(shape, self.axes, self.rank)


def _view(frame: Frame) -> str:
    *batch, m, n = frame.axes.matrix_shape(frame.shape)
    matrix = f"({m}, {n})"
    return f"of {math.prod(batch)} matrices {matrix}" if batch else f"of the matrix {matrix}"


def completed(low_rank: Any, **parts: Any) -> Rules:
    """A `LowRank`, or `rules` of them, with what is None taken from `parts`.

    Raises:
      TypeError: a value that is neither a `LowRank` nor None.
    """

    def fill(value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, LowRank):
            raise TypeError(
                f"expected LowRank(rank=...), rules of them, or None, got {value!r}; a bare rank "
                "is written LowRank(128)"
            )
        return value.completed(**parts)

    if low_rank is None:
        raise TypeError("expected LowRank(rank=...) or rules of them, got None")
    whole = as_rules(low_rank).mapped(fill)
    if not any(whole.values):
        raise ValueError(
            "the rules hold no LowRank, so nothing would be projected: give one, as a value or as "
            "the default, or use the optimizer without projection"
        )
    return whole


def _check_codec(spec: LowRank) -> None:
    """Raises ValueError for parts that cannot do with a basis in codes."""
    if spec.projector is not None and not stores_matrix(spec.projector):
        raise ValueError(
            f"codec={spec.codec!r} is for a basis that is one matrix, and {spec.projector!r} "
            "stores none; use SVD, SubspaceIteration or RandomizedRange, or no codec (galore "
            "instead of q_galore)"
        )
    if isinstance(spec.residual, NormScaled | ErrorFeedback):
        raise ValueError(
            f"{spec.residual!r} needs orthonormal columns, which a basis in {spec.codec!r} does "
            "not have; use Drop() or Scaling(), or leave codec out"
        )


def _check_dtype(dtype: Any) -> None:
    try:
        known = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"dtype must name a floating-point type such as 'bfloat16', got {dtype!r}")


def _check_period(period: Any) -> None:
    if isinstance(period, bool) or not hasattr(period, "__index__"):
        raise TypeError(f"period must be a Python int, a number of steps, got {period!r}")
    if period < 1:
        raise ValueError(f"period must be at least 1 step, got {period!r}")
