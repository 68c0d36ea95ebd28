"""What happens to the inner state of a leaf when its basis changes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like, product, whole_matrices
from optax_structured.projectors import DCT
from optax_structured.projectors.base import Basis, OneSided, Projector, transpose
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.orthonormal import householder
from optax_structured.trees.checks import check_fraction
from optax_structured.trees.precision import at_least_float32

# The fields of optax's states, by the power of the gradient that they average. Nothing is guessed:
# a field that is in neither set cannot be rotated.
FIRST_MOMENTS = frozenset({"mu", "trace", "ema", "acc", "acc_grads", "m", "momentum"})
SECOND_MOMENTS = frozenset({"nu", "nu_max", "sum_of_squares", "v"})


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

    def moments(
        self, fields: Mapping[str, jax.Array], rotation: Any, count: jax.Array
    ) -> dict[str, jax.Array]:
        r"""The low-rank leaves of one inner state, by field.

        Args:
          fields: (\*batch, rank, length) each.
          rotation: :math:`C = P_{new}^\top P_{old}`, (\*batch, rank, rank), computed when called.
          count: steps done.
        """
        return dict(fields)

    @property
    def moves_moments(self) -> bool:
        """Whether the inner state has to pass through the refit at all."""
        return type(self).moments is not Transport.moments


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

    def moments(
        self, fields: Mapping[str, jax.Array], rotation: Any, count: jax.Array
    ) -> dict[str, jax.Array]:
        return {field: jnp.zeros_like(value) for field, value in fields.items()}


@dataclasses.dataclass(frozen=True)
class Align(Transport):
    r"""The new basis is turned towards the old one; the moments stay as they are.

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
    :math:`(C \circ C) V`. Which field of the inner state is which is told by its name (`mu`,
    `trace`, ... and `nu`, ...); a field of another name is an error.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, projector=oxs.SVD(), transport=oxs.Rotate())
    """

    def moments(
        self, fields: Mapping[str, jax.Array], rotation: Any, count: jax.Array
    ) -> dict[str, jax.Array]:
        turn = rotation()

        def move(field: str, value: jax.Array) -> jax.Array:
            c = turn if _power(field, self) == 1 else turn * turn
            return like(product(c, value).astype(value.dtype), value)

        return {field: move(field, value) for field, value in fields.items()}


@dataclasses.dataclass(frozen=True)
class VarianceAware(Transport):
    r"""LDAdam's rule: what moves is the variance, not the mean square.

    With the debiased moments of Adam, :math:`\hat m' = C\hat m` and
    :math:`\hat v' = |(C \circ C)(\hat v - \hat m^2) + \hat m'^2|`.

    Args:
      b1: decay of Adam's first moment, to undo its bias.
      b2: decay of the second.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, transport=oxs.low_rank.VarianceAware(b1=0.9, b2=0.99))

    Reference: Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024.
    """

    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        check_fraction("b1", self.b1)
        check_fraction("b2", self.b2)

    def moments(
        self, fields: Mapping[str, jax.Array], rotation: Any, count: jax.Array
    ) -> dict[str, jax.Array]:
        if set(fields) != {"mu", "nu"}:
            raise ValueError(
                "VarianceAware moves the mu and nu of Adam; the inner state has "
                f"{', '.join(sorted(fields))}: use Rotate(), Keep() or Reset()"
            )
        mu, nu = at_least_float32(fields["mu"]), at_least_float32(fields["nu"])
        steps = jnp.maximum(count, 1).astype(mu.dtype)
        first, second = 1 - self.b1**steps, 1 - self.b2**steps
        mu, nu = variance_aware(rotation(), mu, nu, first, second)
        return {
            name: like(new.astype(fields[name].dtype), fields[name])
            for name, new in (("mu", mu), ("nu", nu))
        }


def variance_aware(
    rotation: jax.Array, mu: jax.Array, nu: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adam's biased moments in a new basis; `first` and `second` are the weights they hold."""
    c = rotation.astype(mu.dtype)
    mean = mu / first
    moved = product(c, mean)
    variance = product(c * c, nu / second - mean**2)
    return first * moved, second * jnp.abs(variance + moved**2)


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
    return transpose(householder(transpose(x)))


def _power(field: str, transport: Transport) -> int:
    if field in FIRST_MOMENTS:
        return 1
    if field in SECOND_MOMENTS:
        return 2
    raise ValueError(
        f"{transport!r} does not know how the field {field!r} of the inner state depends on the "
        "gradient, so it cannot move it to a new basis; use Keep(), Align() or Reset()"
    )


def natural(projector: Projector) -> Transport:
    """What suits a projector when nothing is said: see "How the defaults were chosen" in the docs.

    Fitted bases have signs and an order of their own, and moving moments between them gained
    nothing. The columns chosen from a fixed basis have neither: moments go with their columns.
    """
    return Rotate() if isinstance(projector, DCT) else Keep()


def stores_matrix(projector: Projector) -> bool:
    """Whether a basis is one array, the matrix itself."""
    return type(projector).factors is OneSided.factors
