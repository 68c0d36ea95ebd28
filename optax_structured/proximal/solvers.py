r"""How the subproblem of a proximal step is solved.

.. math:: \min_w\; \langle v, w\rangle + \tfrac12 \langle w - w_0, P\,(w - w_0)\rangle
          + \tau\,\psi(w)

Every solver has `solve(regularizer, linear, metric, centre, strength, warm)`. In a metric that is
one number (no preconditioner: `rmda`, `prox_sgd`) all of them take the regularizer's closed form.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import Regularizer, promote
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

    def solve(
        self,
        regularizer: Regularizer,
        linear: ArrayLike,
        metric: ArrayLike,
        centre: ArrayLike,
        strength: ArrayLike,
        warm: ArrayLike,
    ) -> jax.Array:
        r"""The minimiser of the subproblem, or an approximation to it.

        Args:
            regularizer: :math:`\psi`.
            linear: :math:`v`, any shape.
            metric: :math:`P > 0`, a scalar or like `linear`.
            centre: :math:`w_0`, like `linear`.
            strength: :math:`\tau \ge 0`, a scalar, traced or not.
            warm: where an iteration may start; the current parameters.

        Returns:
            The point, like `linear`, in the precision of `linear` and `metric`, at least float32.
        """


@dataclasses.dataclass(frozen=True)
class Exact:
    """The minimiser itself, as the regularizer computes it: the default.

    Closed forms entry by entry, one scalar root per group for group norms, and for `NuclearNorm` an
    iteration to its own `rtol`. Depends on no starting point.

    >>> import jax.numpy as jnp
    >>> from optax_structured.regularizers.nuclear import NuclearNorm
    >>> v, w0 = jnp.diag(jnp.array([-3.0, -0.5])), jnp.zeros((2, 2))
    >>> print(Exact().solve(NuclearNorm(), v, jnp.full((2, 2), 2.0), w0, 1.0, warm=w0))
    [[1. 0.]
     [0. 0.]]
    """

    def solve(
        self,
        regularizer: Regularizer,
        linear: ArrayLike,
        metric: ArrayLike,
        centre: ArrayLike,
        strength: ArrayLike,
        warm: ArrayLike,
    ) -> jax.Array:
        """The minimiser; see `Solver.solve`."""
        return regularizer.minimise(*_linear_form(linear, metric, centre, strength))


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

    def solve(
        self,
        regularizer: Regularizer,
        linear: ArrayLike,
        metric: ArrayLike,
        centre: ArrayLike,
        strength: ArrayLike,
        warm: ArrayLike,
    ) -> jax.Array:
        """The point where the iteration stops; see `Solver.solve`."""
        if jnp.ndim(metric) == 0:
            return Exact().solve(regularizer, linear, metric, centre, strength, warm)
        if self.accelerate:
            return accelerated_proximal_gradient(
                regularizer,
                *_linear_form(linear, metric, centre, strength),
                warm,
                max_iters=self.max_iters,
                rtol=self.rtol,
            ).point
        return proximal_gradient(
            regularizer,
            linear,
            metric,
            centre,
            strength,
            warm,
            max_iters=self.max_iters,
            rtol=self.rtol,
        ).point


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

    >>> import jax.numpy as jnp
    >>> v, w0 = jnp.diag(jnp.array([-3.0, -0.5])), jnp.zeros((2, 2))
    >>> solver = WeightedALS(max_rank=1, sweeps=8)
    >>> print(solver.solve(NuclearNorm(), v, jnp.full((2, 2), 2.0), w0, 1.0, warm=w0).round(3))
    [[1. 0.]
     [0. 0.]]

    Reference: Srebro and Jaakkola, *Weighted low-rank approximations*, 2003, for the row systems.
    """

    max_rank: int
    sweeps: int = 4

    def __post_init__(self) -> None:
        _check_count("max_rank", self.max_rank)
        _check_count("sweeps", self.sweeps)

    def solve(
        self,
        regularizer: Regularizer,
        linear: ArrayLike,
        metric: ArrayLike,
        centre: ArrayLike,
        strength: ArrayLike,
        warm: ArrayLike,
    ) -> jax.Array:
        """The shrunk product of the factors; see `Solver.solve`."""
        if not isinstance(regularizer, NuclearNorm):
            raise TypeError(
                f"WeightedALS solves for NuclearNorm, got {type(regularizer).__name__}; use Exact()"
            )
        if jnp.ndim(metric) == 0:
            return Exact().solve(regularizer, linear, metric, centre, strength, warm)
        b, p, tau = _linear_form(linear, metric, centre, strength)
        if b.size == 0:
            return b
        axes, vanishes = regularizer.axes, regularizer.is_zero(b, tau)
        p = jnp.broadcast_to(p, b.shape)
        w = weighted_als(
            axes.to_matrix(b),
            axes.to_matrix(p),
            jnp.where(tau == 0, 1.0, tau),
            axes.to_matrix(jnp.asarray(warm, b.dtype)),
            rank=self.max_rank,
            sweeps=self.sweeps,
        )
        # Sweeps only approach zero; the step from zero stays there.
        w = axes.from_matrix(jnp.where(vanishes[..., None, None], 0.0, w), b.shape)
        w = majorised_step(regularizer, b, p, step_size_metric(regularizer, p), tau, w)
        return jnp.where(tau == 0, b / p, w)


def _linear_form(
    linear: ArrayLike, metric: ArrayLike, centre: ArrayLike, strength: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(b, metric, strength) with b = P w0 - v: the same minimiser of 1/2 <w, P w> - <b, w> + ..."""
    v, p, tau = promote(linear, metric, strength)
    return p * jnp.asarray(centre, v.dtype) - v, p, tau


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
