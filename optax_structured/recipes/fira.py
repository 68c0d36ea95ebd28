"""Fira and APOLLO: gradients of full rank in the step sizes of a low-rank optimizer."""

import optax

from optax_structured.low_rank.residuals import NormScaled, Scaling
from optax_structured.low_rank.spec import LowRank, completed
from optax_structured.projectors import RandomProjection
from optax_structured.recipes.galore import galore
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.trees import Rules


def fira(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules,
    *,
    inner: optax.GradientTransformation | None = None,
    scale: ScalarOrSchedule = 0.25,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: GaLore, plus what the subspace leaves out, in the step size of what it holds.

    With P, R, and N = M / (sqrt(V) + eps) as in `galore`, one factor per column
    :math:`\varphi = \|N\|/\|R\|`, and the residual :math:`S = \varphi \circ (G - a P R)`, whose
    norm may grow at most by a factor of 1.01 a step,

    .. math:: W' = W - \eta \frac{\sqrt{1-b_2^t}}{1-b_1^t} (a P N + S), \qquad
        W \leftarrow (1 - \eta d)\, W'

    Inside the subspace :math:`a` does not shrink the step: it blends Adam's direction with the
    rescaled gradient, and the residual runs at the full rate in any case. So Fira's step is about
    1/a times that of GaLore at the same learning rate.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 0.01 to pre-train (0.005 at 7B), 1e-4 to
        fine-tune.
      low_rank: a `LowRank`, or `rules` of them: exclude embeddings, head, norms and biases. Its
        residual, `NormScaled()` by default, has the limiter and the ablations.
      inner: runs inside, instead of Adam; `uncorrected_rms()` is the RMSProp form.
      scale: :math:`a`, a number or schedule; 0.25, and 0.0625 from 1B on.
      b1, b2, eps, weight_decay: of Adam, as in `galore`.

    Returns:
      An optimizer that needs `params` for weight decay only.

    Raises:
      ValueError: as `galore`.

    Equals `galore` at full rank with `scale=1`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.fira(0.01, oxs.rules(("bias", None), default=oxs.LowRank(rank=2)))
      >>> state = optimizer.init({"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)})

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs under Low-rank Constraint?
      <https://arxiv.org/abs/2410.01623>`_, 2024. The paper subtracts P R where the code behind its
      tables subtracts a P R (`NormScaled(exact=True)` is the paper), and corrects the bias of N
      before its norm is taken (`inner=optax.scale_by_adam()` here). A residual of norm zero is not
      remembered by the limiter here; in the code it holds all later ones near zero.
    """
    return galore(
        learning_rate,
        completed(low_rank, residual=NormScaled()),
        inner=inner,
        scale=scale,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )


def apollo(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules,
    *,
    scale: ScalarOrSchedule = 1.0,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: the gradient itself, in step sizes that a random low-rank projection estimates.

    With :math:`R = P^\top G` for a random P of entries N(0, 1/r), Adam's N on it as in `galore`,
    and one factor per column :math:`\varphi = \|N\|/\|R\|`,

    .. math:: W' = W - \eta \frac{\sqrt{1-b_2^t}}{1-b_1^t}\,
        a\, \operatorname{limit}(\varphi \circ G), \qquad W \leftarrow (1 - \eta d)\, W'

    The projection is regenerated from its seed and not stored: the state is :math:`2 p r` numbers
    and a few per matrix.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 0.01 to pre-train.
      low_rank: a `LowRank`, or `rules` of them. Its projector is `RandomProjection()` by default;
        `SVD()` or `SubspaceIteration()` are the variant with a fitted one (Fira's ablation "only
        scaling").
      scale: :math:`a`, a number or schedule; 1. The argument of the published code is its square.
      b1, b2, eps, weight_decay: of Adam, as in `galore`.

    Returns:
      An optimizer that needs `params` for weight decay only.

    Raises:
      ValueError: a value out of range, or as `low_rank_projection`.

    Equals `fira` without the part inside the subspace, as its scale goes to zero, for the same
    projector.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.apollo(0.01, oxs.LowRank(rank=2))
      >>> state = optimizer.init({"kernel": jnp.ones((8, 6))})

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, MLSys 2025.
    """
    return galore(
        learning_rate,
        completed(low_rank, residual=Scaling(), projector=RandomProjection()),
        scale=scale,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )


def apollo_mini(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules = LowRank(rank=1),  # noqa: B008  (frozen)
    *,
    scale: ScalarOrSchedule = 128**0.5,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO-Mini: `apollo` with rank 1 and one factor per matrix; the memory of SGD.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 0.01 to pre-train.
      low_rank: a `LowRank` of rank 1, or `rules` of them.
      scale: :math:`a`, a number or schedule; the root of 128, as rank 1 estimates norms too small.
      b1, b2, eps, weight_decay: of Adam, as in `galore`.

    Returns:
      An optimizer that needs `params` for weight decay only.

    Raises:
      ValueError: as `apollo`.

    Equals `apollo` with `LowRank(rank=1, residual=Scaling(per="matrix"))` and this scale.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> state = oxs.apollo_mini(0.01).init({"kernel": jnp.ones((8, 6))})

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, MLSys 2025. Its `scale=128` enters
      as a square root.
    """
    return apollo(
        learning_rate,
        completed(low_rank, residual=Scaling(per="matrix")),
        scale=scale,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
