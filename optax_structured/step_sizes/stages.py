"""Schedules of training in stages: constant within each, with a restart between them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.trees.checks import check_fraction


@dataclasses.dataclass(frozen=True)
class Stages:
    r"""Schedules of a run in stages, as in every published run of RAMDA and RMDA.

    Given to a recipe, `ramda(..., stages=Stages.equal(total_steps))`, learning rate and eps are
    multiplied by :math:`\gamma` at each milestone and dual averaging restarts. The share
    :math:`c = 1 - momentum` of the new point is constant, and grows in the last stage as
    :math:`\min(c\sqrt i, 1)` with i = 1, 2, ...: only once it is 1, after :math:`c^{-2}` steps, are
    the parameters themselves exactly structured. Give that stage the bulk of the steps.

    Args:
      milestones: increasing numbers of steps, where one stage ends and the next begins.
      gamma: factor of `decay` at each milestone, above 0 and at most 1.
      total_steps: of the run, if known: then a momentum that does not come down to 0 within the
        last stage is an error.

    Raises:
      ValueError: milestones that do not increase from 1 on, or that total_steps does not exceed;
        gamma out of range.

    Equals, taken apart, `restart_at(ramda(stages.decay(1e-2), ..., eps=stages.decay(1e-6),
    momentum=stages.momentum(0.9)), stages.milestones)`.

    Example:
      >>> import optax_structured as oxs
      >>> stages = oxs.Stages.equal(total_steps=600, number=3)
      >>> optimizer = oxs.ramda(1e-2, oxs.GroupLasso(group_axis=-2), strength=1e-3, stages=stages)
      >>> print(*(f"{stages.decay(1.0)(i):.2f}" for i in (0, 199, 200, 400)))
      1.00 1.00 0.10 0.01
      >>> print(*(f"{stages.momentum(0.9)(i):.2f}" for i in (0, 400, 403, 499)))
      0.90 0.90 0.80 0.00

    References:
      Huang and Lee, `Regularized Adaptive Momentum Dual Averaging
      <https://arxiv.org/abs/2403.14398>`_, 2024. The code behind its tables starts the growth of
      momentum one epoch before the last milestone: `momentum(..., growth_start=...)`.
    """

    milestones: tuple[int, ...]
    gamma: float = 0.1
    total_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", check_milestones(self.milestones))
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma!r}")
        if self.total_steps is not None and not max(self.milestones, default=0) < self.total_steps:
            raise ValueError(
                f"total_steps must exceed the milestones {self.milestones}, got {self.total_steps}"
            )

    @classmethod
    def equal(cls, total_steps: int, number: int = 4, gamma: float = 0.1) -> "Stages":
        """`number` stages of the same length; published runs have 3 to 5.

        Raises:
          ValueError: fewer steps than stages, or no stage.

        >>> Stages.equal(1000, 4).milestones
        (250, 500, 750)
        """
        if not 1 <= number <= total_steps:
            raise ValueError(
                f"Stages.equal needs a step for each stage: got {total_steps} steps and {number} "
                "stages"
            )
        milestones = tuple(total_steps * i // number for i in range(1, number))
        return cls(milestones, gamma, total_steps)

    def stage(self, count: jax.Array | int) -> jax.Array:
        """Index of the stage that the step after `count` steps belongs to, from 0, int32."""
        return jnp.sum(jnp.asarray(count) >= jnp.asarray(self.milestones, jnp.int32), dtype=int)

    def decay(self, value: ScalarOrSchedule) -> optax.Schedule:
        """`value` (a number or schedule) times gamma for each milestone passed."""

        def schedule(count: jax.Array) -> jax.Array:
            base = value(count) if callable(value) else value
            return base * jnp.asarray(self.gamma, float) ** self.stage(count).astype(float)

        return schedule

    def momentum(
        self,
        value: ScalarOrSchedule,
        *,
        growth_start: int | None = None,
        rule: Literal["last_stage", "per_stage"] = "last_stage",
    ) -> optax.Schedule:
        r"""Momentum by stages, from `value` = 1 - c in [0, 1).

        Args:
          value: momentum before it changes, a number or schedule.
          growth_start: number of steps after which :math:`c\sqrt i` starts at i = 1; by default the
            last milestone, as in the paper. Published runs: one epoch less.
          rule: "last_stage", or "per_stage" for the protocol of 2021: c divided by gamma at each
            milestone, at most 1, and no growth within a stage.

        Returns:
          A schedule, 0 at the end.

        Raises:
          ValueError: momentum outside [0, 1), or too near 1 for the length of the last stage; an
            unknown rule, or a growth_start with "per_stage".
        """
        check_fraction("momentum", value)
        if rule not in ("last_stage", "per_stage") or (rule == "per_stage" and growth_start):
            raise ValueError(
                'rule must be "last_stage", or "per_stage" without growth_start; got '
                f"{rule!r} and growth_start={growth_start!r}"
            )
        start = growth_start if growth_start is not None else max(self.milestones, default=0)
        if rule == "last_stage" and self.total_steps is not None:
            _check_reaches_zero(value, self.total_steps - start)

        def schedule(count: jax.Array) -> jax.Array:
            share = 1 - (value(count) if callable(value) else value)
            if rule == "per_stage":
                growth = jnp.asarray(1 / self.gamma, float) ** self.stage(count).astype(float)
            else:
                growth = jnp.sqrt(jnp.maximum(jnp.asarray(count, float) - start + 1, 1.0))
            return 1 - jnp.minimum(share * growth, 1.0)

        return schedule


def _check_reaches_zero(momentum: Any, steps: int) -> None:
    """Raises ValueError if a number for momentum is not 0 after so many steps of growth."""
    if callable(momentum) or isinstance(momentum, jax.core.Tracer):
        return
    needed = math.ceil((1 - float(momentum)) ** -2 - 1e-9)
    if needed > steps:
        raise ValueError(
            f"momentum {momentum} takes {needed} steps of the last stage to come down to 0, and "
            f"that has {steps}, so the parameters would never be exactly structured: train longer, "
            f"in fewer stages, or with momentum at most {math.floor((1 - steps**-0.5) * 100) / 100}"
        )


def check_stages(stages: Any) -> None:
    """Raises TypeError unless these are `Stages`, or None."""
    if stages is not None and not isinstance(stages, Stages):
        raise TypeError(
            "stages must be Stages.equal(total_steps, number) or Stages(milestones), got "
            f"{stages!r}"
        )


def check_milestones(milestones: Sequence[int]) -> tuple[int, ...]:
    """The milestones as a tuple; raises ValueError unless they increase from 1 on."""
    milestones = tuple(milestones)
    whole = all(isinstance(m, int) and m >= 1 for m in milestones)
    if not whole or list(milestones) != sorted(set(milestones)):
        raise ValueError(
            "milestones must be increasing whole numbers of steps, at least 1 each; got "
            f"{milestones!r}"
        )
    return milestones
