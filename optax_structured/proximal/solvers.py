"""How the subproblem of a proximal step is solved: exactly, or by a published iteration.

In a metric that is one number (no preconditioner: `rmda`, `prox_sgd`) all of them take the
regularizer's closed form.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from optax_structured.proximal.subproblem import Subproblem, unpenalised
from optax_structured.regularizers.base import Regularizer
from optax_structured.regularizers.group import ShrunkGroups
from optax_structured.regularizers.nuclear import NuclearNorm
from optax_structured.regularizers.proximal_gradient import (
    accelerated_proximal_gradient,
    majorised_step,
    proximal_gradient,
    step_size_metric,
)
from optax_structured.regularizers.weighted_als import weighted_als


class Solver(Protocol):
    """What a proximal step needs of a solver; a frozen, hashable record."""

    def solve(self, regularizer: Regularizer, sub: Subproblem, warm: jax.Array) -> jax.Array:
        r"""The minimiser of a subproblem, or an approximation to it.

        .. math:: \min_w\; \langle V, w\rangle + \tfrac12 \langle w - W_0, P\,(w - W_0)\rangle
                  + \tau\,\psi(w)

        Args:
            regularizer: :math:`\psi`.
            sub: direction :math:`V`, metric :math:`P`, centre :math:`W_0` and weight
                :math:`\tau \ge 0`, all of one precision, at least float32.
            warm: where an iteration may start, like the direction.

        Returns:
            The point, like the direction.
        """


@dataclasses.dataclass(frozen=True)
class Exact:
    """The minimiser itself, as the regularizer computes it: the default.

    Closed forms entry by entry, one scalar root per group for group norms, and for `NuclearNorm` an
    iteration to its own `rtol`. Depends on no starting point.

    >>> Exact()
    Exact()
    """

    def solve(self, regularizer: Regularizer, sub: Subproblem, warm: jax.Array) -> jax.Array:
        """The minimiser; see `Solver.solve`."""
        if isinstance(regularizer, ShrunkGroups):
            # XLA would keep b beside the point b / P that a prox takes: one more array of the leaf.
            b = sub.metric * sub.centre - sub.direction
            return regularizer.minimise(b, sub.metric, sub.weight)
        return regularizer.prox(unpenalised(sub), sub.metric, sub.weight)


@dataclasses.dataclass(frozen=True)
class ProximalGradient:
    """The published inexact solver, to reproduce published runs: proximal gradient from `warm`.

    Those depend on its inexactness (errors of 1-40 % early in training of low-rank models): they
    used the defaults for group lasso and `ProximalGradient(max_iters=5, rtol=1e-3)` for the nuclear
    norm. See `proximal_gradient`. Equals `Exact` for regularizers that act on each entry alone.

    Args:
        max_iters: cap on the number of steps, at least 1.
        rtol: stop once the objective falls by less than `rtol * (|objective| + 1)` in a step; at
            least 0.
        accelerate: add momentum with restarts, not published. The objective then need not fall at
            every step, so `rtol` becomes the certified accuracy of the point instead; 1e-3 to
            1e-4 is useful. See `accelerated_proximal_gradient`.

    Raises:
        ValueError: `max_iters` below 1 or `rtol` negative.

    >>> ProximalGradient(max_iters=5, rtol=1e-3)
    ProximalGradient(max_iters=5, rtol=0.001, accelerate=False)

    Reference: Huang and Lee, *Regularized Adaptive Momentum Dual Averaging with an Efficient
    Inexact Subproblem Solver for Training Structured Neural Network*, 2024.
    """

    max_iters: int = 100
    rtol: float = 1e-8
    accelerate: bool = False

    def __post_init__(self) -> None:
        _check_count("max_iters", self.max_iters)
        if not self.rtol >= 0:
            raise ValueError(f"rtol must be at least 0, got {self.rtol!r}")

    def solve(self, regularizer: Regularizer, sub: Subproblem, warm: jax.Array) -> jax.Array:
        """The point where the iteration stops; see `Solver.solve`."""
        if sub.metric.ndim == 0:
            return Exact().solve(regularizer, sub, warm)
        v, p, centre, tau = sub.direction, sub.metric, sub.centre, sub.weight
        i, rtol = self.max_iters, self.rtol
        if self.accelerate:
            return accelerated_proximal_gradient(
                regularizer, p * centre - v, p, tau, warm, max_iters=i, rtol=rtol
            ).point
        return proximal_gradient(regularizer, v, p, centre, tau, warm, max_iters=i, rtol=rtol).point


@dataclasses.dataclass(frozen=True)
class WeightedALS:
    """The nuclear norm of large matrices: factors of bounded rank, then one exact shrinking step.

    A few sweeps of `weighted_als` from `warm` do what takes proximal gradient hundreds of steps
    where the metric is ill-conditioned (errors of 1e-4 to 1e-3 after four on problems from
    training; up to 2e-1 on random ones, which are far from `warm`), and cost three SVDs and
    `sweeps` times about `2 m n max_rank**2` multiply-adds. The closing
    proximal-gradient step leaves exact zeros in the spectrum. If the rank sought exceeds `max_rank`
    the result is not it; `certificate` tells.

    Args:
        max_rank: bound on the rank, at least 1; the rank expected plus 2.
        sweeps: at least 1; 2 to 8 is useful.

    Raises:
        ValueError: a count below 1.
        TypeError: when solving, for a regularizer other than `NuclearNorm`.

    >>> WeightedALS(max_rank=8)
    WeightedALS(max_rank=8, sweeps=4)

    Reference: Srebro and Jaakkola, *Weighted low-rank approximations*, 2003, for the row systems.
    """

    max_rank: int
    sweeps: int = 4

    def __post_init__(self) -> None:
        _check_count("max_rank", self.max_rank)
        _check_count("sweeps", self.sweeps)

    def solve(self, regularizer: Regularizer, sub: Subproblem, warm: jax.Array) -> jax.Array:
        """The shrunk product of the factors; see `Solver.solve`."""
        if not isinstance(regularizer, NuclearNorm):
            raise TypeError(
                f"WeightedALS solves for NuclearNorm, got {type(regularizer).__name__}; use Exact()"
            )
        if sub.metric.ndim == 0:
            return Exact().solve(regularizer, sub, warm)
        p, tau = sub.metric, sub.weight
        b = p * sub.centre - sub.direction
        if b.size == 0:
            return b
        axes, norms = regularizer.axes, jnp.max(regularizer.singular_values(b), axis=-1)
        w = weighted_als(
            axes.to_matrix(b),
            axes.to_matrix(p),
            jnp.where(tau == 0, 1.0, tau),
            axes.to_matrix(warm),
            rank=self.max_rank,
            sweeps=self.sweeps,
        )
        # Sweeps only approach zero; the step from zero stays there.
        w = axes.from_matrix(jnp.where((norms <= tau)[..., None, None], 0.0, w), b.shape)
        w = majorised_step(regularizer, b, p, step_size_metric(regularizer, p), tau, w)
        return jnp.where(tau == 0, unpenalised(sub), w)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
