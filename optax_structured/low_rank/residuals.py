"""What becomes of the part of a gradient that is outside its subspace."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.low_rank.shardings import Places
from optax_structured.meshes.placement import like, zeros
from optax_structured.projectors import products
from optax_structured.projectors.base import BasisFactors, OneSided, Projector
from optax_structured.projectors.frames import Frame
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms.limiter import limit
from optax_structured.trees.checks import check_fraction
from optax_structured.trees.precision import at_least_float32, finite
from optax_structured.xla.one_by_one import one_by_one

_TINY = 1e-8  # added to norms that divide, in the unit of the gradient


class InTurn(NamedTuple):
    """The bases of a stack: what products read of each is made when it is its turn."""

    stored: Any


class Step(NamedTuple):
    """One leaf in the middle of an update."""

    spec: Any  # the LowRank
    frame: Frame
    factors: BasisFactors | InTurn
    gradient: jax.Array  # (*batch, m, n), as in memory: with what `absorb` added
    scale: Any  # a
    count: jax.Array  # type: ignore[assignment]  # steps done

    def project(self) -> jax.Array:
        """The low-rank leaf R of the gradient."""
        return self._with_factors(products.project, self.gradient)

    def lift(self, low: jax.Array) -> jax.Array:
        """The matrices of a low-rank leaf."""
        return self._with_factors(products.lift, low)

    def _with_factors(self, product: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        factors = self.factors

        def of_stack(frame: Frame, factors: BasisFactors, x: jax.Array) -> jax.Array:
            return product(frame, *jax.tree.map(self._operand, (factors, x)))

        if not isinstance(factors, InTurn):
            return of_stack(self.frame, factors, x)
        frame, axes = self.frame.one, len(self.frame.batch)
        places = Places(frame, self.gradient[(0,) * axes])

        def of_one(stored: Any, x: jax.Array) -> jax.Array:
            return of_stack(frame, places.factors(self.spec, stored), x)

        return one_by_one(of_one, axes, factors.stored, x)

    def _operand(self, x: jax.Array) -> jax.Array:
        return at_least_float32(x) if self.spec.dtype is None else x.astype(self.spec.dtype)


class Residual(abc.ABC):
    """A rule; subclasses are frozen dataclasses."""

    def check(self, projector: Projector) -> None:  # noqa: B027  (nothing to check by default)
        """Raises ValueError for a projector that this rule cannot work with."""

    def init(self, frame: Frame, dtype: Any, places: Places) -> Any:
        """What the rule remembers of a leaf."""
        return ()

    def absorb(self, state: Any, gradient: jax.Array) -> jax.Array:
        """The leaf to project instead of the gradient."""
        return gradient

    @abc.abstractmethod
    def combine(
        self, state: Any, step: Step, low: jax.Array, direction: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The update as matrices, (\\*batch, m, n), and what to remember.

        Args:
          state: what `init` or the last `combine` gave.
          step: the leaf in the middle of the update.
          low: (\\*batch, rank, length): R.
          direction: like `low`: N, what the inner transformation made of it.
        """


@dataclasses.dataclass(frozen=True)
class Drop(Residual):
    r"""Discards the residual: the update is :math:`a P N`, as in GaLore.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, residual=oxs.low_rank.Drop())
    """

    def combine(
        self, state: Any, step: Step, low: jax.Array, direction: jax.Array
    ) -> tuple[jax.Array, Any]:
        return step.lift(step.scale * direction), state


@dataclasses.dataclass(frozen=True)
class ErrorFeedback(Residual):
    r"""What a step leaves out is added to the next gradient.

    .. math:: A_t = G_t + E_{t-1}, \qquad E_t = A_t - (1 - \mu) P P^\top A_t

    Args:
      momentum: :math:`\mu` in [0, 1), a number or schedule. 0 is error feedback; above it the
        buffer also keeps that share of what was used: it is Trion's (and Dion's) momentum.
      codec: stores the buffer, as long as a leaf, in fewer bytes; None is float32.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, residual=oxs.ErrorFeedback())
    """

    momentum: ScalarOrSchedule = 0.0
    codec: Any = None

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

    def init(self, frame: Frame, dtype: Any, places: Places) -> Any:
        buffer = zeros(frame.shape, dtype, *(places.leaf or ()))
        return buffer if self.codec is None else self.codec.encode(buffer)

    def absorb(self, state: Any, gradient: jax.Array) -> jax.Array:
        buffer = at_least_float32(state if self.codec is None else self.codec.decode(state))
        return finite(gradient).astype(buffer.dtype) + buffer

    def combine(
        self, state: Any, step: Step, low: jax.Array, direction: jax.Array
    ) -> tuple[jax.Array, Any]:
        used = 1 - (self.momentum(step.count) if callable(self.momentum) else self.momentum)
        left = step.gradient - step.lift(used * low)
        buffer = step.frame.axes.from_matrix(left, step.frame.shape)
        update = step.lift(step.scale * direction)
        if self.codec is not None:
            return update, self.codec.encode(buffer)
        return update, like(buffer.astype(state.dtype), state)


@dataclasses.dataclass(frozen=True)
class Scaling(Residual):
    r"""APOLLO: the gradient itself, in the step sizes that the low-rank optimizer would take.

    With one factor per column (rank axis reduced) and the limiter of norm growth,

    .. math:: \varphi = \|N\| / (\|R\| + 10^{-8}), \qquad S = \varphi \circ G, \qquad
        L = \max\!\big(\tfrac{\|S\|}{s}, \gamma\big) / \gamma, \qquad
        \text{update} = a S / L, \quad s \leftarrow \|S\| / L.

    Needs no orthonormal basis and no way back.

    Args:
      growth: :math:`\gamma \ge 1`; 1.01. `math.inf` switches the limiter off.
      per: one factor per "column", or one per "matrix" (APOLLO-Mini, rank 1).

    Example:
      >>> import math, optax_structured as oxs
      >>> without_limiter = oxs.low_rank.Scaling(growth=math.inf)
      >>> optimizer = oxs.apollo(1e-2, oxs.LowRank(rank=2, residual=without_limiter))

    Reference: Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
    """

    growth: float = 1.01
    per: Literal["column", "matrix"] = "column"

    def __post_init__(self) -> None:
        if not self.growth >= 1:
            raise ValueError(
                "growth must be at least 1, the factor by which a norm may grow in a step, got "
                f"{self.growth!r}"
            )
        if self.per not in ("column", "matrix"):
            raise ValueError(f"per must be 'column' or 'matrix', got {self.per!r}")

    def check(self, projector: Projector) -> None:
        if not isinstance(projector, OneSided):
            raise ValueError(
                f"{self!r} needs a projector with one matrix, which {projector!r} is not; use "
                "Drop()"
            )

    def init(self, frame: Frame, dtype: Any, places: Places) -> jax.Array:
        # The norm of the last limited residual, one per matrix.
        return places.basis(jnp.zeros(frame.batch, dtype))

    def combine(
        self, state: jax.Array, step: Step, low: jax.Array, direction: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        factor, _ = _factor(low, direction, self.per)
        norm = jnp.sqrt(jnp.sum(factor**2 * _column_squares(step), (-2, -1)))
        passed, norm = limit(norm, state, self.growth, _TINY)
        factor = step.scale * factor * passed[..., None, None]
        return _plus_scaled_gradient(None, factor, step), norm.astype(state.dtype)


@dataclasses.dataclass(frozen=True)
class NormScaled(Scaling):
    r"""Fira: what the subspace leaves out takes the step size of what it holds.

    With the factors :math:`\varphi` of `Scaling`, and its limiter on the residual,

    .. math:: S = \varphi \circ (G - a P R), \qquad
        L = \max\!\big(\tfrac{\|S\|}{s}, \gamma\big) / \gamma, \qquad
        \text{update} = a P N + S / L, \quad s \leftarrow \|S\| / L.

    As P has orthonormal columns, no third product is needed:
    :math:`aPN + S/L = P (aN - a\varphi R/L) + \varphi G/L`, and
    :math:`\|S\|^2 = \sum_c \varphi_c^2 (\|G_c\|^2 - (2a - a^2) \|R_c\|^2)`.

    Args:
      growth: :math:`\gamma`, as in `Scaling`.
      per: as in `Scaling`.
      exact: subtract :math:`P R` instead of :math:`a P R`: what the paper writes. The published
        results are from code that scales it.

    Example:
      >>> import optax_structured as oxs
      >>> as_in_the_paper = oxs.NormScaled(exact=True)
      >>> optimizer = oxs.fira(1e-2, oxs.LowRank(rank=2, residual=as_in_the_paper))

    Reference: Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024.
    """

    exact: bool = False

    def check(self, projector: Projector) -> None:
        super().check(projector)
        if not projector.orthonormal:
            raise ValueError(
                f"NormScaled subtracts what is inside the subspace, for which {projector!r} needs "
                "orthonormal columns; use Scaling(), or an orthonormal projector"
            )

    def combine(
        self, state: jax.Array, step: Step, low: jax.Array, direction: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        inside = 1.0 if self.exact else step.scale
        factor, held = _factor(low, direction, self.per)
        squares = factor**2 * (_column_squares(step) - (2 * inside - inside**2) * held)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(squares, (-2, -1)), 0.0))
        passed, norm = limit(norm, state, self.growth, _TINY)
        factor = factor * passed[..., None, None]
        lifted = step.lift(step.scale * direction - inside * factor * low)
        return _plus_scaled_gradient(lifted, factor, step), norm.astype(state.dtype)


def _factor(low: jax.Array, direction: jax.Array, per: str) -> tuple[jax.Array, jax.Array]:
    """The factors, (\\*batch, 1, length or 1), and the squared norms of the columns of R."""
    made = jnp.sum(jnp.square(direction), -2, keepdims=True)
    held = jnp.sum(jnp.square(low), -2, keepdims=True)
    if per == "matrix":
        made, total = (jnp.sum(x, -1, keepdims=True) for x in (made, held))
        return jnp.sqrt(made) / (jnp.sqrt(total) + _TINY), held
    return jnp.sqrt(made) / (jnp.sqrt(held) + _TINY), held


def _column_squares(step: Step) -> jax.Array:
    """The squared norms of the columns of the gradient; 0 for one that is not finite."""
    axis = -2 if step.frame.side == "rows" else -1
    squares = jnp.sum(jnp.square(at_least_float32(step.gradient)), axis, keepdims=True)
    squares = step.frame.turn(squares)
    return jnp.where(jnp.isfinite(squares), squares, 0)


def _plus_scaled_gradient(lifted: jax.Array | None, factor: jax.Array, step: Step) -> jax.Array:
    """`lifted` plus the gradient with scaled columns."""
    scaled = step.frame.turn(factor) * finite(step.gradient).astype(factor.dtype)
    return scaled if lifted is None else lifted + scaled
