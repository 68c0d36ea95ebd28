"""GaLore: any optimizer inside low-rank subspaces of the gradients."""

import optax

from optax_structured.low_rank.spec import LowRank
from optax_structured.low_rank.wrapper import low_rank_projection
from optax_structured.recipes.descent import adam_or, descent
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms import decay_updated_weights, skip_nonfinite
from optax_structured.trees import Rules


def galore(
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
    r"""GaLore: Adam, or any other optimizer, inside low-rank subspaces of the gradients.

    For each projected leaf, with P its basis (see `low_rank_projection`), :math:`R = P^\top G` and

    .. math::
        M &\leftarrow b_1 M + (1-b_1) R, \qquad V \leftarrow b_2 V + (1-b_2) R^2 \\
        W' &= W - \eta \frac{\sqrt{1-b_2^t}}{1-b_1^t}\, a\, P \frac{M}{\sqrt V + \epsilon}, \qquad
        W \leftarrow (1 - \eta d)\, W'

    and for the others the same without P and :math:`a`. For a matrix of p x q entries, q the
    smaller, the state is :math:`q r + 2 p r` numbers instead of :math:`2 p q`.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 0.01 to pre-train (0.005 at 7B), where
        :math:`a\eta` is the real step of projected leaves; 1e-5 to 3e-5 to fine-tune.
      low_rank: a `LowRank`, or `rules` of them: exclude embeddings, head, norms and biases.
      inner: runs inside, instead of Adam: `optax.scale_by_lion()`, `optax.trace(0.9)`,
        `optax.scale_by_factored_rms()`, `optax.scale_by_adam()` (which adds eps after correction).
      scale: :math:`a`, a number or schedule; 0.25 to pre-train, 2 to 4 to fine-tune.
      b1, b2: decays of Adam's mean and mean square, in [0, 1), numbers or schedules.
      eps: added to its uncorrected root, a number or schedule.
      weight_decay: d, of the updated weights, a number or schedule.

    Returns:
      An optimizer that needs `params` for weight decay only.

    Raises:
      ValueError: a value out of range, an `inner` together with settings of Adam, or as
        `low_rank_projection`.

    Equals, with a projector on the larger side, `optax.contrib.galore` up to where eps is added.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> low_rank = oxs.rules(("bias", None), default=oxs.LowRank(rank=2))
      >>> optimizer = oxs.galore(0.01, low_rank)
      >>> params = {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
      <https://arxiv.org/abs/2403.03507>`_, ICML 2024. Its eps of 1e-8 after correction is 1e-6
      before it in the code that made its tables, and here. The published code keeps the moments and
      the arbitrary signs of the SVD across a refit; signs here are fixed, and the default projector
      moves its columns along with the gradient.
    """
    inner, correction = adam_or(inner, b1, b2, eps)
    return skip_nonfinite(
        low_rank_projection(inner, low_rank, scale=scale),
        *correction,
        descent(learning_rate),
        decay_updated_weights(learning_rate, weight_decay),
    )
