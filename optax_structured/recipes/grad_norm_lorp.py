"""GradNormLoRP: weight normalisation, with the gradient of the directions in low rank."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax

from optax_structured.low_rank.spec import LowRank
from optax_structured.low_rank.wrapper import low_rank_projection
from optax_structured.recipes.descent import descent
from optax_structured.recipes.end_of_chain import closed
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms import (
    bias_correction,
    decay_updated_weights,
    lookahead_weight_norm,
    uncorrected_adam,
    weight_normalized,
)
from optax_structured.trees import Axes, Rules, as_rules, resolve
from optax_structured.trees.checks import check_choice, check_nonnegative

Mode = Literal["weight_norm", "lookahead"]


def grad_norm_lorp(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules,
    *,
    scale: ScalarOrSchedule = 0.25,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    mode: Mode = "weight_norm",
) -> optax.GradientTransformationExtraArgs:
    r"""GradNormLoRP: a magnitude and a direction a row, the direction trained by GaLore.

    Each row of a projected leaf (the weights of one output) is :math:`g\,v/\|v\|`; Adam trains the
    magnitudes g, and `galore` the directions v, on their share of the gradient:

    .. math::
        G_g &= \langle G, v\rangle/\|v\|, \qquad G_v = G - G_g\, v/\|v\| \\
        W &\leftarrow (1-\eta d)(g + \Delta_g)\, \frac{v + \Delta_v}{\|v + \Delta_v\|}

    Leaves that are not projected are trained by Adam.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 0.01 to pre-train, 3e-5 to fine-tune.
      low_rank: a `LowRank`, or `rules` of them. Its axes say which are rows, in the layout
        (outputs, inputs) by default; for kernels (inputs, outputs) write
        `LowRank(..., axes=Axes(rows=-1, cols=-2))`.
      scale: a, of the steps of the directions, a number or schedule; 0.25 to pre-train, 4 to
        fine-tune.
      b1, b2: decays of the means and mean squares of both Adams, in [0, 1), numbers or schedules.
      eps: added to their uncorrected roots, a number or schedule.
      weight_decay: d, of the magnitudes after the step (decay of v would change nothing), and of
        the leaves that are not normalised; a number or schedule.
      mode: `"weight_norm"`, the method as meant, or `"lookahead"`, as released: a copy of the
        parameters follows `galore`, all leaves are normalised, and each step of the magnitudes is
        forgotten at the next.

    Returns:
      An optimizer that needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of range, an unknown mode, or as `low_rank_projection`.

    Equals weight normalisation by Adam, in rotated coordinates, at full rank and scale 1.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.grad_norm_lorp(0.01, oxs.LowRank(rank=2))
      >>> params = {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)

    References:
      Huang et al., `Gradient Weight-normalized Low-rank Projection for Efficient LLM Training
      <https://arxiv.org/abs/2412.19616>`_, AAAI 2025. The trainer its README names never writes the
      optimised weights back, and its other class is the lookahead above, without the tangential
      projection of weight normalisation; rows of zeros are NaN there, and take a plain step here.
    """
    check_nonnegative("scale", scale)
    check_choice("mode", mode, Mode)
    projection = low_rank_projection(uncorrected_adam(b1, b2, eps), low_rank, scale=scale)
    steps = (bias_correction(b1, b2), descent(learning_rate))
    decay = decay_updated_weights(learning_rate, weight_decay)
    magnitude = optax.chain(uncorrected_adam(b1, b2, eps), *steps, decay)
    if mode == "lookahead":
        direction = optax.chain(projection, *steps, decay)
        return closed(lookahead_weight_norm(direction, magnitude, _axes(low_rank)))

    def plain(params: Any) -> Any:
        leaves = [axes is None for axes in resolve(_axes(low_rank), params)]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    direction = optax.chain(projection, *steps, optax.masked(decay, plain))
    return closed(weight_normalized(direction, magnitude, _axes(low_rank)))


@dataclasses.dataclass(frozen=True)
class _AxesOf:
    """The axes of a record, on the leaves that the record projects."""

    low_rank: LowRank

    def check(self, shape: Sequence[int]) -> None:
        self.low_rank.check(shape)

    def fitted(self, shape: Sequence[int]) -> Axes:
        return self.low_rank.axes


def _axes(low_rank: LowRank | Rules) -> Rules:
    """The axes of each record."""
    return as_rules(low_rank).mapped(lambda spec: None if spec is None else _AxesOf(spec))
