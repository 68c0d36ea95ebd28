"""Low-rank optimizers on a fixed cosine basis: DCT-AdamW and Trion."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_structured.low_rank.leaves import plan
from optax_structured.low_rank.refresh import Periodic
from optax_structured.low_rank.residuals import Drop, ErrorFeedback
from optax_structured.low_rank.spec import LowRank, completed
from optax_structured.low_rank.wrapper import low_rank_projection
from optax_structured.projectors import DCT
from optax_structured.recipes.descent import decoupled, descent
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms import debiased_adam, orthogonalize, skip_nonfinite
from optax_structured.trees import Rules, resolve
from optax_structured.trees.checks import check_choice, check_fraction

ShapeFactor = Literal["kj", "kimi", "dion", "none"]


def dct_adamw(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules,
    *,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    error_feedback: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""DCT-AdamW: Adam on the columns of a cosine basis that carry most of the gradient.

    With E what earlier steps left out, and P the chosen columns of the DCT matrix,

    .. math::
        A &= G + E, \qquad R = P^\top A, \qquad E \leftarrow A - P R \\
        W &\leftarrow (1 - \eta d) W - \eta P \operatorname{Adam}(R)

    and AdamW for leaves that are not projected. Columns are chosen again at each step; a coordinate
    that stays chosen keeps its moments, a new one starts from zero. State of a matrix of p x q
    entries, q the smaller: :math:`r + 2 p r` numbers, and :math:`p q` more for E.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; as for AdamW, 1e-4 to 1e-2.
      low_rank: a `LowRank`, or `rules` of them; its period is 1 and its projector `DCT()` unless
        they are given. Leave out embedding and head, whose basis would be as long as the
        vocabulary.
      b1, b2: decays of Adam's mean and mean square, in [0, 1), numbers or schedules.
      eps: added to its corrected root, a number or schedule.
      weight_decay: d, decoupled, a number or schedule.
      error_feedback: keep E; without it what is outside the chosen columns is dropped.

    Returns:
      An optimizer that needs `params` for weight decay only.

    Raises:
      ValueError: a value out of range, or as `low_rank_projection`.

    Equals Adam in the rotated coordinates of the cosine basis at full rank.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.dct_adamw(1e-3, oxs.LowRank(rank=2))
      >>> state = optimizer.init({"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)})

    References:
      Modoranu et al., `SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models
      <https://arxiv.org/abs/2505.17967>`_, 2025. Its code matches moments with columns by their
      position in an unordered list, and rotates them in place, which is undefined; its 8-bit error
      buffer has 16 levels. With a period T it fits at the steps 1, T, 2T, ..., as here.
    """
    table = completed(
        low_rank,
        period=1,
        projector=DCT(),
        refresh=Periodic(offset=1),
        residual=ErrorFeedback() if error_feedback else Drop(),
    )
    return skip_nonfinite(
        low_rank_projection(debiased_adam(b1, b2, eps), table),
        decoupled(weight_decay),
        descent(learning_rate),
    )


def trion(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules,
    *,
    inner: optax.GradientTransformation | None = None,
    momentum: ScalarOrSchedule = 0.95,
    weight_decay: ScalarOrSchedule = 0.0,
    scaling: ShapeFactor = "kj",
    adam_learning_rate: ScalarOrSchedule = 3e-4,
) -> optax.GradientTransformationExtraArgs:
    r"""Trion: orthogonalised momentum in the columns of a cosine basis that carry most of it.

    With M the momentum, as large as the leaf, and P the chosen columns,

    .. math::
        B &= M + G, \qquad b = P^\top B, \qquad M \leftarrow B - (1-\mu) P b \\
        W &\leftarrow (1 - \eta d) W - \eta\, s\, P \operatorname{orthogonalize}(b)

    For rows of outputs and columns of inputs, s is :math:`\sqrt{\max(1, rows/cols)}` ("kj"),
    :math:`0.2\sqrt{\max(rows, cols)}` ("kimi"), :math:`\sqrt{rows/cols}` ("dion") or 1 ("none").
    Leaves that are not projected are trained by Adam with decays 0.9 and 0.95, eps 1e-10 and a
    learning rate of their own.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 0.02.
      low_rank: a `LowRank`, or `rules` of them; its period is 1 and its projector
        `DCT(kind="matrix")` unless they are given. Rows are taken for outputs: for kernels of shape
        (inputs, outputs) say `axes=Axes(rows=-1, cols=-2)`, or use "kimi" or "none".
      inner: runs inside; `orthogonalize()`, and `orthogonalize(dtype=jnp.bfloat16)` as published.
      momentum: :math:`\mu` in [0, 1), a number or schedule.
      weight_decay: d, decoupled, a number or schedule; of all leaves.
      scaling: s.
      adam_learning_rate: of the leaves that are not projected, a number or schedule.

    Returns:
      An optimizer that needs `params` for weight decay only.

    Raises:
      ValueError: a value out of range, an unknown scaling, or as `low_rank_projection`.

    Equals Muon without Nesterov's step at full rank, in exact arithmetic.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.trion(0.02, oxs.LowRank(rank=2))
      >>> state = optimizer.init({"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)})

    References:
      Modoranu et al., `FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of
      Large Language Models <https://arxiv.org/abs/2505.17967>`_, ICLR 2026. Its code orthogonalises
      in bfloat16, here float32. Its FFT form is `projector=DCT(kind="dct2")`; for wide matrices the
      code scores one basis there and goes back by its transpose.
    """
    check_fraction("momentum", momentum)
    check_choice("scaling", scaling, ShapeFactor)
    table = completed(
        low_rank,
        period=1,
        projector=DCT(kind="matrix"),
        refresh=Periodic(),
        residual=ErrorFeedback(momentum=momentum),
    )

    def labels(params: Any) -> Any:
        kinds = ["matrix" if p else "other" for _, p in plan(table, params).values()]
        return jax.tree.unflatten(jax.tree.structure(params), kinds)

    matrices = optax.chain(
        low_rank_projection(orthogonalize() if inner is None else inner, table),
        _scaled_by_shape(table, scaling),
        decoupled(weight_decay),
        descent(learning_rate),
    )
    others = optax.chain(
        debiased_adam(0.9, 0.95, 1e-10),
        decoupled(weight_decay),
        descent(adam_learning_rate, "adam_learning_rate"),
    )
    return skip_nonfinite(optax.partition({"matrix": matrices, "other": others}, labels))


def _scaled_by_shape(table: Rules, scaling: ShapeFactor) -> optax.GradientTransformation:
    """The factor s of each projected leaf."""

    def factor(shape: tuple[int, ...], spec: LowRank) -> float:
        *_, rows, cols = spec.axes.matrix_shape(shape)
        return {
            "kj": math.sqrt(max(1.0, rows / cols)),
            "kimi": 0.2 * math.sqrt(max(rows, cols)),
            "dion": math.sqrt(rows / cols),
            "none": 1.0,
        }[scaling]

    def scale(updates: Any, params: Any = None) -> Any:
        structure: Any
        leaves, structure = jax.tree.flatten(updates)
        pairs = zip(leaves, resolve(table, updates), strict=True)
        return structure.unflatten(u * factor(jnp.shape(u), spec) for u, spec in pairs)

    return optax.stateless(scale)
