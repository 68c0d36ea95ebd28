"""What happens to the inner state of a leaf when its basis changes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.low_rank.inner_state import Moment
from optax_structured.meshes.placement import like, product, whole_matrices
from optax_structured.projectors import DCT
from optax_structured.projectors.base import Basis, OneSided, Projector, transpose
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import orthonormal


class Transport:
    """A rule; subclasses are frozen dataclasses."""

    def check(self, projector: Projector) -> None:
        """Raises ValueError for a projector without one matrix that this rule needs."""
        if not isinstance(projector, OneSided):
            raise ValueError(
                f"{self!r} needs a projector with one matrix, which {projector!r} is not; use "
                "Keep() or Reset()"
            )

    def basis(self, projector: Any, frame: Frame, old: Basis, new: Basis) -> Basis:
        """The new basis as it is kept."""
        return new

    def move(
        self, moment: Moment, value: jax.Array, rotation: Callable[[], jax.Array]
    ) -> jax.Array:
        r"""An array of the inner state, (\*batch, rank, length), as the new basis needs it.

        Args:
          moment: what the array is.
          value: the array.
          rotation: gives :math:`C = P_{new}^\top P_{old}`, (\*batch, rank, rank).
        """
        raise NotImplementedError

    @property
    def moves_moments(self) -> bool:
        """Whether the inner state has to pass through the refit at all."""
        return type(self).move is not Transport.move


@dataclasses.dataclass(frozen=True)
class Keep(Transport):
    """Nothing moves: what GaLore does. The result depends on the signs of the basis.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, projector=oxs.SVD(), transport=oxs.Keep())
    """

    def check(self, projector: Projector) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Reset(Transport):
    """The moments of the leaf start again from zero.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, transport=oxs.Reset())
    """

    def check(self, projector: Projector) -> None:
        pass

    def move(
        self, moment: Moment, value: jax.Array, rotation: Callable[[], jax.Array]
    ) -> jax.Array:
        return jnp.zeros_like(value)


@dataclasses.dataclass(frozen=True)
class Align(Transport):
    r"""The new basis is turned towards the old one; the moments are kept unchanged.

    .. math:: P = P_{new} O, \qquad O = \operatorname{polar}(P_{new}^\top P_{old})

    Among all bases of the new subspace it is the nearest to the old one, so signs and order of
    singular vectors play no role. Costs products of r x r matrices and one QR of that size, and
    leaves the moments untouched. Where the two subspaces share a direction only in rounding error
    the polar factor is arbitrary there, and any orthogonal completion is taken.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, transport=oxs.Align())
    """

    def check(self, projector: Projector) -> None:
        super().check(projector)
        if not stores_matrix(projector):
            raise ValueError(
                f"Align turns the columns of a stored basis, and {projector!r} stores none; use "
                "Rotate(), which moves the moments instead, Keep() or Reset()"
            )

    def basis(self, projector: OneSided, frame: Frame, old: Basis, new: Basis) -> Basis:
        # Stored is the transpose of P.
        return like(product(transpose(polar(projector.overlap(frame, old, new))), new), new)


@dataclasses.dataclass(frozen=True)
class Rotate(Transport):
    r"""The moments are expressed in the new basis.

    With :math:`C = P_{new}^\top P_{old}`: first moments :math:`C M`, second moments
    :math:`(C \circ C) V`. Which array of the inner state is which is known of the states of optax;
    a state of your own says it beside its fields, `mu: oxs.states.FirstMoment`. What is neither is
    an error.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, projector=oxs.SVD(), transport=oxs.Rotate())
    """

    def move(
        self, moment: Moment, value: jax.Array, rotation: Callable[[], jax.Array]
    ) -> jax.Array:
        c = rotation()
        if moment.power not in (1, 2) or value.ndim < c.ndim:
            raise ValueError(
                f"{self!r} does not know how {moment} of the inner state depends on the gradient, "
                "so it cannot move it to a new basis; say so beside the field (FirstMoment or "
                "SecondMoment of oxs.states), or use Keep(), Align() or Reset()"
            )
        return like(product(c if moment.power == 1 else c * c, value).astype(value.dtype), value)


def polar(c: jax.Array, iterations: int = 24) -> jax.Array:
    """The orthogonal polar factor of matrices of norm at most 1, to rounding.

    Newton-Schulz, products only, made exactly orthogonal by a QR at the end, of which only the
    directions in which `c` vanishes are arbitrary.
    """
    high = jax.lax.Precision.HIGHEST
    eye = jnp.eye(c.shape[-1], dtype=c.dtype)

    def step(_: int, x: jax.Array) -> jax.Array:
        return product(x, 1.5 * eye - 0.5 * product(transpose(x), x, high), high)

    # A norm of 1 plus rounding is inside the region of convergence, which ends at sqrt(3).
    x = jax.lax.fori_loop(0, iterations, step, whole_matrices(c))
    return transpose(orthonormal(transpose(x)))


def default_transport(projector: Projector) -> Transport:
    """Default transport of a projector: see "How the defaults were chosen" in the docs.

    Fitted bases have signs and an order of their own, and moving moments between them gained
    nothing. The columns chosen from a fixed basis have neither: moments go with their columns.
    """
    return Rotate() if isinstance(projector, DCT) else Keep()


def stores_matrix(projector: Projector) -> bool:
    """Whether a basis is one array, the matrix itself."""
    return isinstance(projector, OneSided) and projector.stored
