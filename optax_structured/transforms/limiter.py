"""The norm of an update may grow only by a small factor per step."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import Factor
from optax_structured.trees.checks import check_positive
from optax_structured.trees.precision import (
    as_updates,
    at_least_float32,
    scalar_dtype,
    times,
    wide_dtype,
)
from optax_structured.trees.tree_checks import check_real


class NormGrowthLimiterState(NamedTuple):
    """State of `norm_growth_limiter`."""

    clock: Clock  # steps since init, for schedules
    norm: Factor[jax.Array]  # (leaves,), () if global; float32 or wider: last norm let through or 0


def norm_growth_limiter(
    growth: ScalarOrSchedule = 1.01,
    eps: ScalarOrSchedule = 1e-8,
    *,
    per: Literal["leaf", "global"] = "leaf",
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks updates so that their norm grows at most by a factor per step.

    With :math:`s` the norm that was let through last,

    .. math:: U_t \leftarrow U_t \min\big(1, \gamma (s + \epsilon) / \|U_t\|\big), \qquad
        s \leftarrow \|U_t\|,

    so :math:`\|U_t\| \le \gamma(\|U_{t-1}\| + \epsilon)`, and norms shrink freely. The first norm
    above zero passes unchanged. A norm of zero is not remembered: as a limit it would hold all
    later norms near :math:`\epsilon` for a thousand steps. Neither is one that is not finite: an
    update with NaN stays NaN, one whose norm overflows becomes zero, and the next is limited as if
    that had not been.

    Args:
      growth: :math:`\gamma`, a number or schedule; 1 to 1.1, 1.01 in Fira.
      eps: :math:`\epsilon > 0`, in the unit of the norm, a number or schedule.
      per: `"leaf"` limits each leaf by itself, `"global"` the norm of all leaves together.

    Returns:
      An element that needs no `params`. Its state is `NormGrowthLimiterState`.

    Raises:
      ValueError: a growth or eps of at most zero, or an unknown `per`.

    Equals `optax.identity` while no norm grows by more than the factor.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> limiter = oxs.norm_growth_limiter(growth=2.0)
      >>> state = limiter.init(jnp.zeros(2))
      >>> for update in (jnp.array([3.0, 4.0]), jnp.array([30.0, 40.0]), jnp.zeros(2)):
      ...     limited, state = limiter.update(update, state)
      ...     print(limited)
      [3. 4.]
      [6. 8.]
      [0. 0.]

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024. Its code remembers a norm of
      zero; and there, and in `fira`, only the residual of the projection is limited.
    """
    check_positive("growth", growth)
    check_positive("eps", eps)
    if per not in get_args(Literal["leaf", "global"]):
        raise ValueError(f"per must be 'leaf' or 'global', got {per!r}")

    def init(params: Any) -> NormGrowthLimiterState:
        check_real("norm_growth_limiter", params)
        shape = () if per == "global" else (len(jax.tree.leaves(params)),)
        return NormGrowthLimiterState(new_clock(), jnp.zeros(shape, scalar_dtype(params)))

    def update(
        updates: Any, state: NormGrowthLimiterState, params: Any = None, **_: Any
    ) -> tuple[Any, NormGrowthLimiterState]:
        leaves = jax.tree.leaves(updates)
        if not leaves:
            return updates, state
        dtype = wide_dtype(state.norm)
        squares = jnp.stack([_square(u).astype(dtype) for u in leaves])
        norm = jnp.sqrt(squares if per == "leaf" else jnp.sum(squares))
        factor, norm = limit(norm, state.norm, now(growth, state.clock), now(eps, state.clock))
        factors = jnp.broadcast_to(factor, (len(leaves),))
        limited = [times(u, f) for u, f in zip(leaves, factors, strict=True)]
        limited = jax.tree.unflatten(jax.tree.structure(updates), limited)
        new = NormGrowthLimiterState(tick(state.clock), norm.astype(state.norm.dtype))
        return as_updates(limited, updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def limit(
    norm: jax.Array, previous: jax.Array, growth: Any, eps: Any
) -> tuple[jax.Array, jax.Array]:
    r"""How much of updates with these norms passes, and the norms to remember.

    Args:
      norm: of the updates, one entry for each that is limited by itself.
      previous: like `norm`: what was remembered last, 0 where there is none yet.
      growth: largest factor of growth.
      eps: added to `previous`.

    Returns:
      `(factor, remembered)`, both like `norm`.

    >>> import jax.numpy as jnp
    >>> factor, remembered = limit(jnp.array([8.0, 0.0]), jnp.array([2.0, 2.0]), 2.0, 0.0)
    >>> print(factor, remembered)
    [0.5 1. ] [4. 2.]
    """
    previous = at_least_float32(previous)
    growth, eps = (jnp.asarray(x, previous.dtype) for x in (growth, eps))
    most = growth * (previous + eps)
    grown = (previous > 0) & (norm > most)
    # Ends in a division, which XLA does not repeat in each kernel that reads the factor.
    factor = jnp.where(grown, most, 1) / jnp.where(grown, norm, 1)
    countable = (norm > 0) & jnp.isfinite(norm)
    return factor, jnp.where(countable, norm * factor, previous)


def _square(u: Any) -> jax.Array:
    return jnp.sum(jnp.square(at_least_float32(u)))
