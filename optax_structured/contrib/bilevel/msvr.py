"""MSVR: STORM for many blocks, of which a step sees some."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.transforms.storm import corrected_average
from optax_structured.trees.checks import check_nonnegative, check_share
from optax_structured.trees.precision import at_least_float32


class MSVRState(NamedTuple):
    """State of `msvr`."""

    clock: Clock  # steps since init, for schedules
    seen: jax.Array  # (m,) bool: blocks that have an estimate
    estimate: Any  # like params, leaves (m, ...), float32 or wider: s


def msvr(
    alpha: ScalarOrSchedule,
    num_blocks: int,
    blocks_per_step: int,
    gamma: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient estimates of m blocks, I of which get a gradient at each step.

    For the blocks i that are sampled, with gradients :math:`G_i, G_i^-` of the same samples at the
    current and at the previous point,

    .. math:: s_i \leftarrow (1-\alpha) s_i + \alpha G_i + \gamma (G_i - G_i^-), \qquad
        \gamma = \frac{m-I}{I(1-\alpha)} + 1 - \alpha,

    and the others keep their estimate. :math:`\gamma` is so much above 1 because the difference
    has to make up for the steps at which the block was not seen.

    Args:
      alpha: :math:`\alpha` in (0, 1], below 1 if I < m; a number or schedule; 0.5 to 0.9.
      num_blocks: m.
      blocks_per_step: I.
      gamma: instead of the rule above; published code takes 1.

    Returns:
      An element for parameters with leaves (m, ...). Its update takes gradients with leaves
      (I, ...), `grads_prev=` like them, and `blocks=`, (I,) different integers; it returns the
      estimates of all blocks. Its state is `MSVRState`.

    Raises:
      ValueError: values out of the ranges above; an update without `grads_prev` or `blocks`.

    Equals `storm(alpha)` if all blocks are seen at each step.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = msvr(0.5, num_blocks=3, blocks_per_step=1)
      >>> state = tx.init(jnp.zeros((3, 1)))
      >>> for new, old in ((2.0, 2.0), (3.0, 2.0)):
      ...     grads, grads_prev = jnp.array([[new]]), jnp.array([[old]])
      ...     s, state = tx.update(grads, state, grads_prev=grads_prev, blocks=jnp.array([1]))
      ...     print(s[:, 0])
      [0. 2. 0.]
      [0. 7. 0.]

    References:
      Jiang et al., `Multi-block-Single-probe Variance Reduced Estimator for Coupled Compositional
      Optimization <https://arxiv.org/abs/2207.08540>`_, 2022.
    """
    correction = check_blocks("alpha", alpha, num_blocks, blocks_per_step, gamma)

    def init(params: Any) -> MSVRState:
        estimate = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        return MSVRState(new_clock(), jnp.zeros(num_blocks, bool), estimate)

    def update(
        updates: Any,
        state: MSVRState,
        params: Any = None,
        *,
        grads_prev: Any = None,
        blocks: jax.Array | None = None,
        **_: Any,
    ) -> tuple[Any, MSVRState]:
        del params
        if grads_prev is None or blocks is None:
            raise ValueError(
                "msvr needs which blocks the gradients are of, and those of the same samples at "
                "the previous point: update(grads, state, params, grads_prev=..., blocks=...)"
            )
        first = ~state.seen[blocks]
        share, excess = now(alpha, state.clock), now(correction, state.clock)

        def move(s: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
            fresh = first.reshape(-1, *[1] * (s.ndim - 1))
            moved = corrected_average(s[blocks], new, old, share, excess)
            return s.at[blocks].set(jnp.where(fresh, new.astype(s.dtype), moved))

        estimate = jax.tree.map(move, state.estimate, updates, grads_prev)
        seen = state.seen.at[blocks].set(True)
        updates = jax.tree.map(lambda s, g: s.astype(g.dtype), estimate, updates)
        return updates, MSVRState(tick(state.clock), seen, estimate)

    return optax.GradientTransformationExtraArgs(init, update)


def check_blocks(
    name: str, share: Any, num_blocks: int, blocks_per_step: int, correction: Any
) -> ScalarOrSchedule:
    """The multiplier of differences, by the rule of `msvr` if none is given.

    >>> print(check_blocks("alpha", 0.5, 6, 2, None))
    4.5
    """
    check_share(name, share)
    if not 1 <= blocks_per_step <= num_blocks:
        raise ValueError(
            f"blocks_per_step must be from 1 to num_blocks={num_blocks}, got {blocks_per_step!r}"
        )
    if correction is not None:
        check_nonnegative("gamma", correction)
        return correction
    missed = (num_blocks - blocks_per_step) / blocks_per_step

    def rule(share: Any) -> Any:
        return (missed / (1 - share) if missed else 0.0) + 1 - share

    if callable(share):
        return lambda count: rule(share(count))
    if missed and not isinstance(share, jax.core.Tracer) and share == 1:
        raise ValueError(
            f"{name}=1 keeps nothing of a block between the steps at which it is seen; take it "
            "below 1, or see all blocks at each step"
        )
    return rule(share)
