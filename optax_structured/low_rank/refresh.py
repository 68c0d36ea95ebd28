"""When a subspace is refit."""

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import like, whole_matrices
from optax_structured.projectors.base import Basis, OneSided, Projector
from optax_structured.projectors.frames import Frame, matrix_where
from optax_structured.states.roles import Bases, Factor
from optax_structured.trees.checks import check_fraction


class Refitted(NamedTuple):
    """A leaf that was refit."""

    projector: Projector
    frame: Frame  # its view
    old: Basis
    new: Basis
    before: jax.Array  # (*batch,) bool: had its first fits; what `old` says of others is arbitrary
    now: jax.Array  # (*batch,) bool: fitted now; the others keep their basis


class Refresh(abc.ABC):
    """A rule; subclasses are frozen dataclasses.

    A leaf is always due on its first `first_fits` steps, which its projector sets.
    """

    def check(self, projector: Projector) -> None:  # noqa: B027  (nothing to check by default)
        """Raises ValueError for a projector that this rule cannot judge."""

    def init(self, frame: Frame, period: int) -> Any:
        """What the rule remembers of a leaf."""
        return ()

    @abc.abstractmethod
    def due(self, state: Any, count: jax.Array, period: int, share: float) -> Any:
        """Whether to refit at this step.

        Args:
          state: what `init` or `after` gave.
          count: steps done, int32.
          period: of the leaf, in steps.
          share: position of the leaf among all projected leaves, in [0, 1).
        """

    def after(self, state: Any, refitted: Refitted) -> Any:
        """The memory after a refit; `state` is what `init` or `after` gave."""
        return state


@dataclasses.dataclass(frozen=True)
class Periodic(Refresh):
    """All leaves at the same steps: their first fits, and every `period` steps.

    Args:
      offset: steps by which later refits come early. The published DCT-AdamW counts its steps from
        1, which is an offset of 1.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, refresh=oxs.Periodic())
    """

    offset: int = 0

    def due(self, state: Any, count: jax.Array, period: int, share: float) -> Any:
        return (
            True
            if period == 1
            else _multiple(count + self.offset if self.offset else count, period)
        )


@dataclasses.dataclass(frozen=True)
class Staggered(Refresh):
    """Each leaf at steps of its own, spread evenly over the period; all at their first fits.

    Flattens the step time, and never moves all subspaces at once.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, refresh=oxs.Staggered())
    """

    def due(self, state: Any, count: jax.Array, period: int, share: float) -> Any:
        return True if period == 1 else _multiple(count + int(share * period), period)


@dataclasses.dataclass(frozen=True)
class External(Refresh):
    """Only where the extra argument `refresh` of the update says so, after the first fits.

    `update(grads, state, params, refresh=mask)` with a bool for all leaves, or a tree of them like
    the parameters. The mask overrides every other rule as well.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.galore(1e-2, oxs.LowRank(rank=2, refresh=oxs.low_rank.External()))
      >>> params = {"kernel": jnp.ones((8, 5))}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params, refresh={"kernel": True})
    """

    def due(self, state: Any, count: jax.Array, period: int, share: float) -> Any:
        raise ValueError(
            "External() refits where the extra argument refresh of the update is true: call "
            "update(grads, state, params, refresh=mask), a bool or a tree of bools like params"
        )


class LazyState(NamedTuple):
    """What `Lazy` remembers of a leaf."""

    gap: jax.Array  # () int32: steps between refits now
    similarities: Factor[jax.Array]  # (memory,) float32: of the latest refits, newest last
    seen: jax.Array  # () int32: how many of them there are
    direction: Bases[jax.Array]  # (*batch, size): leading vector last fitted; (0,) for "subspace"


@dataclasses.dataclass(frozen=True)
class Lazy(Refresh):
    r"""Q-GaLore's rule: a subspace that stopped moving is fitted more and more rarely.

    After each refit the similarity of the old and the new subspace joins the last `memory` ones;
    once these are complete and their mean reaches `threshold`, the gap :math:`T` of that leaf is
    multiplied by `growth`. A leaf is due when :math:`t \bmod T = 0` with its gap of now. Of a leaf
    with batch axes, the similarity is the mean over the matrices that were fitted before.

    Args:
      threshold: of the mean similarity, in [0, 1); 0.4. At or above 1 nothing ever grows.
      growth: factor of the gap; 2.
      memory: number of similarities; 5.
      similarity: "direction", :math:`|\cos|` of the leading vectors (the published rule has a
        signed cosine, in which an arbitrary sign of the SVD looks like a change), or "subspace",
        the mean squared cosine of the principal angles, :math:`\|P_{old}^\top P_{new}\|_F^2 / r`.

    Example:
      >>> import optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, refresh=oxs.Lazy(threshold=0.4))

    Reference: Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024.
    """

    threshold: float = 0.4
    growth: float = 2.0
    memory: int = 5
    similarity: Literal["direction", "subspace"] = "direction"

    def __post_init__(self) -> None:
        if self.threshold < 1:
            check_fraction("threshold", self.threshold)
        if not self.growth > 1 or self.memory < 1:
            raise ValueError(
                f"Lazy needs growth above 1 and a memory of at least 1, got growth={self.growth!r} "
                f"and memory={self.memory!r}"
            )
        if self.similarity not in ("direction", "subspace"):
            raise ValueError(
                f"similarity must be 'direction' or 'subspace', got {self.similarity!r}"
            )

    def check(self, projector: Projector) -> None:
        if not isinstance(projector, OneSided):
            raise ValueError(
                f"Lazy compares one subspace per matrix, which {projector!r} does not have; use "
                "Periodic or Staggered"
            )

    def init(self, frame: Frame, period: int) -> LazyState:
        shape = (*frame.batch, frame.size) if self.similarity == "direction" else (0,)
        return LazyState(
            jnp.asarray(period, jnp.int32),
            jnp.zeros(self.memory, jnp.float32),
            jnp.zeros((), jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )

    def due(self, state: LazyState, count: jax.Array, period: int, share: float) -> Any:
        return count % state.gap == 0

    def after(self, state: LazyState, refitted: Refitted) -> LazyState:
        projector, frame, old, new, before, now = refitted
        assert isinstance(projector, OneSided)
        if self.similarity == "subspace":
            overlap = projector.overlap(frame, old, new)
            values = jnp.sum(overlap**2, (-2, -1)) / overlap.shape[-1]
            direction = state.direction
        else:
            leading = whole_matrices(projector.factors(frame, new))[..., 0, :]
            leading = like(leading.astype(state.direction.dtype), state.direction)
            direction = matrix_where(now, leading, state.direction)
            values = jnp.abs(jnp.sum(direction * state.direction, -1))
        again = like(before & now, values)
        value = jnp.sum(values, where=again) / jnp.maximum(jnp.sum(again, dtype=values.dtype), 1)
        compared = jnp.any(again)
        latest = jnp.append(state.similarities[1:], value.astype(state.similarities.dtype))
        similarities = jnp.where(compared, latest, state.similarities)
        seen = jnp.where(compared, jnp.minimum(state.seen + 1, self.memory), state.seen)
        similar = jnp.mean(similarities) >= self.threshold if self.threshold < 1 else False
        stable = compared & (seen == self.memory) & similar
        grown = (self.growth * state.gap.astype(jnp.float32)).astype(jnp.int32)
        gap = jnp.where(stable, grown, state.gap)
        return LazyState(gap, similarities, seen, direction)


def _multiple(steps: jax.Array, period: int) -> jax.Array:
    """Whether the period has passed; `%` is a longer program, and counts are never negative."""
    return jax.lax.rem(steps, jnp.asarray(period, steps.dtype)) == 0
