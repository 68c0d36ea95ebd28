"""What every projector can do: say how it sees a leaf, fit a basis, and give its factors."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import product
from optax_structured.projectors.frames import Frame, matrix_where
from optax_structured.trees import Axes
from optax_structured.trees.precision import at_least_float32
from optax_structured.xla.conditional import branch

Basis = Any  # a pytree of arrays
BasisFactors = Any  # what `products.project` and `products.lift` read


class Refit(NamedTuple):
    """What a basis is fitted to."""

    frame: Frame  # the view of the leaf
    basis: Basis  # the one before
    matrix: jax.Array  # (*batch, m, n): the gradient in its own orientation, in any precision
    due: jax.Array  # (*batch,) bool
    fitted: jax.Array  # (*batch,) bool: False where `basis` was never fitted
    seed: Any  # () uint32: a function of the leaf's name and of the step


class Projector(abc.ABC):
    """Where a low-rank leaf comes from; subclasses are frozen dataclasses and hold no arrays.

    A leaf is due at every step until it was fitted `first_fits` times, 1 to 127.
    """

    first_fits: int = 1

    @property
    def orthonormal(self) -> bool:
        """Whether lifting undoes projecting within the subspace: P has orthonormal columns."""
        return True

    def frame(self, shape: Sequence[int], axes: Axes, rank: Any) -> Frame:
        """The view of a leaf.

        Raises:
          TypeError, ValueError: in a sentence, for a leaf or rank that it cannot take.
        """
        return matrix_frame(shape, axes, rank)

    def init(self, frame: Frame, dtype: Any, name: str) -> Basis:
        """The basis before the first fit: zeros, or a start for it.

        Args:
          frame: the view of the leaf.
          dtype: of a basis that is stored.
          name: path of the leaf, for what differs between leaves that are alike.
        """
        return tuple(jnp.zeros((*frame.batch, n, r), dtype) for n, r in frame.compressed)

    @abc.abstractmethod
    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        """A basis for a gradient, where it is due and the gradient finite and not zero.

        Returns:
          The basis, and a bool of shape batch: which matrices were fitted; the others keep the one
          before. `where_usable` makes both of a function of a usable gradient.
        """

    def factors(self, frame: Frame, basis: Basis) -> BasisFactors:
        """What `project` and `lift` read: one matrix (see `OneSided`), or one factor an axis."""
        return basis


class OneSided(Projector):
    r"""Projectors with one matrix: :math:`R = P^\top G` and back :math:`P N`.

    The basis, or what `factors` computes from it, is :math:`P^\top`, (\*batch, rank, size): both
    products then read leaf, basis and R in an order that needs no copy, on either side, and all
    low-rank state is rank-major.
    """

    stored: bool = True  # whether the basis is that matrix

    def init(self, frame: Frame, dtype: Any, name: str) -> Basis:
        (factor,) = super().init(frame, dtype, name)
        return transpose(factor)

    def overlap(self, frame: Frame, old: Basis, new: Basis) -> jax.Array:
        r"""(\*batch, rank, rank): :math:`P_{new}^\top P_{old}`."""
        return product(self.factors(frame, new), self.factors(frame, old), transpose_b=True)


def where_usable(fit: Callable[..., Basis], step: Refit, *operands: Any) -> tuple[Basis, jax.Array]:
    """`fit(basis, gradient, *operands)` for the matrices that are due and can be fitted.

    Args:
      fit: of the oriented gradient, float32 at least; not called where no matrix is fitted. It
        closes over nothing that is traced.
      step: as in `Projector.refit`.
      operands: what else `fit` reads.

    Returns:
      As `Projector.refit`.

    Example:
      >>> import dataclasses, jax.numpy as jnp, optax_structured as oxs
      >>> @dataclasses.dataclass(frozen=True)
      ... class FirstAxes(oxs.projectors.OneSided):  # the first rows of the identity
      ...     def refit(self, step):
      ...         rank, size = step.basis.shape[-2:]
      ...         return oxs.projectors.where_usable(
      ...             lambda basis, gradient: jnp.eye(rank, size, dtype=basis.dtype), step
      ...         )
      >>> optimizer = oxs.galore(1e-2, oxs.LowRank(rank=2, projector=FirstAxes()))
    """

    def some(basis: Basis, usable: jax.Array, matrix: jax.Array, *operands: Any) -> Basis:
        new = fit(basis, step.frame.turn(matrix), *operands)
        return jax.tree.map(lambda n, old: matrix_where(usable, n, old), new, basis)

    def none(basis: Basis, *_: Any) -> Basis:
        return basis

    # Pass it untransposed; XLA copies transposed operands.
    matrix = at_least_float32(step.matrix)
    size = jnp.sum(jnp.abs(matrix), (-2, -1))
    usable = step.due & jnp.isfinite(size) & (size > 0)
    return branch(jnp.any(usable), some, none, step.basis, usable, matrix, *operands), usable


def matrix_frame(shape: Sequence[int], axes: Axes, rank: Any) -> Frame:
    """The view of a leaf as matrices, with at most the smaller side for rank.

    Raises:
      TypeError, ValueError: a leaf or rank for which there is none.
    """
    axes.check(shape)
    check_rank(rank)
    *_, m, n = axes.matrix_shape(shape)
    return Frame(tuple(shape), axes, min(rank, m, n))


def transpose(x: jax.Array) -> jax.Array:
    """Swaps the matrix axes."""
    return jnp.swapaxes(x, -1, -2)


def widest() -> Any:
    """float64 where it is enabled, else float32: for factors that are computed, not stored."""
    return jnp.result_type(float)


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
