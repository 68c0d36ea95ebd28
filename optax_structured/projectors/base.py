"""What every projector can do: fit a basis, and move leaves into and out of it."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from optax_structured.meshes.placement import product
from optax_structured.projectors.frames import Frame, matrix_where
from optax_structured.trees import Axes
from optax_structured.trees.precision import at_least_float32
from optax_structured.xla.conditional import branch

Basis = Any  # a pytree of arrays
Factors = Any  # what `project` and `lift` read


class Projector(abc.ABC):
    """Where a low-rank leaf comes from; subclasses are frozen dataclasses and hold no arrays.

    A leaf is due at every step until it was fitted `first_fits` times, 1 to 127.
    """

    first_fits: int = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own, from_refit = vars(cls), Projector.refit_where
        # An inherited `refit_where` would bypass this `refit`.
        if "refit" in own and "refit_where" not in own and cls.refit_where is not from_refit:
            cls.refit_where = from_refit  # type: ignore[method-assign]

    def view(self, shape: Sequence[int], axes: Axes) -> Axes:
        """The axes that a frame of this leaf is given."""
        return axes

    def check(self, shape: Sequence[int], axes: Axes, rank: Any) -> None:
        """Raises ValueError, in a sentence, for a leaf or rank that this projector cannot take."""
        axes.check(shape)
        check_rank(rank)

    def rank(self, shape: Sequence[int], axes: Axes, rank: Any) -> Any:
        """The rank that is kept of a leaf: at most the smaller side of its matrices."""
        *_, m, n = axes.matrix_shape(shape)
        return min(rank, m, n)

    def numbers(self, frame: Frame) -> int:
        """What a basis and two moments in its subspace take; two moments of a leaf take twice it.

        The same for all projectors of one matrix, whether they store it or compute it: then a table
        of rules says the same before it is known which recipe reads it.
        """
        rank: int = frame.rank  # type: ignore[assignment]
        return frame.count * rank * (frame.size + 2 * frame.length)

    @property
    def orthonormal(self) -> bool:
        """Whether lifting undoes projecting within the subspace: P has orthonormal columns."""
        return True

    @abc.abstractmethod
    def low_shape(self, frame: Frame) -> tuple[int, ...]:
        """Shape of the low-rank leaf."""

    @abc.abstractmethod
    def init(self, frame: Frame, dtype: Any) -> Basis:
        """The basis before the first fit: zeros, or a start for it."""

    @abc.abstractmethod
    def refit(
        self, frame: Frame, basis: Basis, gradient: jax.Array, fitted: jax.Array, seed: Any
    ) -> Basis:
        """A basis for this gradient.

        Args:
          frame: the view of the leaf.
          basis: the one before.
          gradient: oriented, (\\*batch, size, length), float32 at least.
          fitted: bool, of shape batch; False where `basis` was never fitted.
          seed: () uint32, a function of the leaf's name and of the step.
        """

    def refit_where(
        self,
        due: jax.Array,
        frame: Frame,
        basis: Basis,
        matrix: jax.Array,
        fitted: jax.Array,
        seed: Any,
    ) -> tuple[Basis, jax.Array]:
        r"""`refit` for the matrices that are due and can be fitted: finite, and not zero.

        Args:
          due: bool, of shape batch.
          frame: the view of the leaf.
          basis: the one before, which the other matrices keep.
          matrix: the gradient in its own orientation, (\*batch, m, n), in any precision.
          fitted: bool, of shape batch; False where `basis` was never fitted.
          seed: as for `refit`.

        Returns:
          The basis, and a bool of shape batch: which matrices were fitted.
        """

        def fit(basis: Basis, usable: jax.Array, matrix: jax.Array, *rest: Any) -> Basis:
            new = self.refit(frame, basis, frame.turn(matrix), *rest)
            return jax.tree.map(lambda n, old: matrix_where(usable, n, old), new, basis)

        def keep(basis: Basis, *_: Any) -> Basis:
            return basis

        # Pass it untransposed; XLA copies transposed operands.
        matrix = at_least_float32(matrix)
        size = jnp.sum(jnp.abs(matrix), (-2, -1))
        usable = due & jnp.isfinite(size) & (size > 0)
        new = branch(jnp.any(usable), fit, keep, basis, usable, matrix, fitted, seed)
        return new, usable

    @abc.abstractmethod
    def factors(self, frame: Frame, basis: Basis) -> Factors:
        """What `project` and `lift` read."""

    @abc.abstractmethod
    def project(self, frame: Frame, factors: Factors, matrix: jax.Array) -> jax.Array:
        r"""The low-rank leaf of a leaf seen as matrices, (\*batch, m, n)."""

    @abc.abstractmethod
    def lift(self, frame: Frame, factors: Factors, low: jax.Array) -> jax.Array:
        r"""The matrices, (\*batch, m, n), of a low-rank leaf."""


class OneSided(Projector):
    r"""Projectors with one matrix: :math:`R = P^\top G` and back :math:`P N`.

    What is stored is :math:`P^\top`, (\*batch, rank, size): both products then read leaf, basis and
    R in an order that needs no copy, on either side, and all low-rank state is rank-major.
    """

    def fit(
        self,
        frame: Frame,
        matrix: jax.Array,
        gradient: jax.Array,
        fitted: jax.Array,
        seed: jax.Array,
    ) -> jax.Array:
        r"""`refit` of a stored matrix: P, (\*batch, size, rank), from the one before."""
        raise NotImplementedError

    def refit(
        self, frame: Frame, basis: Basis, gradient: jax.Array, fitted: jax.Array, seed: Any
    ) -> Basis:
        return transpose(self.fit(frame, transpose(basis), gradient, fitted, seed))

    def low_shape(self, frame: Frame) -> tuple[int, ...]:
        return (*frame.batch, frame.rank, frame.length)  # type: ignore[arg-type]

    def init(self, frame: Frame, dtype: Any) -> Basis:
        return jnp.zeros((*frame.batch, frame.rank, frame.size), dtype)

    def factors(self, frame: Frame, basis: Basis) -> jax.Array:
        r""":math:`P^\top`, (\*batch, rank, size)."""
        return basis

    def matrix(self, frame: Frame, basis: Basis) -> jax.Array:
        r"""P, (\*batch, size, rank)."""
        return transpose(self.factors(frame, basis))

    def project(self, frame: Frame, factors: Factors, matrix: jax.Array) -> jax.Array:
        return product(_narrow(factors, matrix), matrix, transpose_b=frame.side == "cols")

    def lift(self, frame: Frame, factors: Factors, low: jax.Array) -> jax.Array:
        factors = _narrow(factors, low)
        first, second = (low, factors) if frame.side == "cols" else (factors, low)
        if jnp.finfo(low.dtype).bits >= 32:
            return product(first, second, transpose_a=True)
        return product(_written_out(transpose(first)), second)

    def overlap(self, frame: Frame, old: Basis, new: Basis) -> jax.Array:
        r"""(\*batch, rank, rank): :math:`P_{new}^\top P_{old}`."""
        return product(self.factors(frame, new), self.factors(frame, old), transpose_b=True)


def _written_out(left: jax.Array) -> jax.Array:
    """The left operand of a product of narrow types, small and transposed, in an order of its own.

    XLA for CPUs has no such product whose left operand is transposed where it is read, and would
    widen both. Over several devices it would gather what a layout is asked of.
    """
    if jax.device_count() > 1:
        return left
    rows_first = Layout(tuple(range(left.ndim)))
    return jax.lax.platform_dependent(
        left, cpu=lambda x: with_layout_constraint(x, rows_first), default=lambda x: x
    )


def transpose(x: jax.Array) -> jax.Array:
    """Swaps the matrix axes."""
    return jnp.swapaxes(x, -1, -2)


def widest() -> Any:
    """float64 where it is enabled, else float32: for factors that are computed, not stored."""
    return jnp.result_type(float)


def _narrow(factors: jax.Array, leaf: jax.Array) -> jax.Array:
    """Computed factors come in the widest dtype: a leaf below float64 stays there."""
    wider = factors.dtype == jnp.float64 and leaf.dtype != jnp.float64
    return factors.astype(jnp.float32) if wider else factors


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError unless `value` is a whole number, `least` to `most`."""
    whole = not isinstance(value, bool) and hasattr(value, "__index__")
    if not whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a Python int {limits}, got {value!r}")


def check_rank(rank: Any) -> None:
    """Raises unless `rank` is a whole number of at least 1, known while tracing."""
    if isinstance(rank, jax.core.Tracer):
        raise TypeError(
            "rank must be a Python int: it decides shapes, so it cannot be traced (static_args of "
            "optax.inject_hyperparams, or an ordinary argument of the function that builds the "
            "optimizer)"
        )
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise TypeError(f"rank must be a Python int, got {rank!r}")
    if rank < 1:
        raise ValueError(
            f"rank must be at least 1, got {rank!r}; None instead of a LowRank, in "
            "rules, leaves a leaf plain"
        )
