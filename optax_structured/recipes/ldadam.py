"""LDAdam: AdamW in a subspace that moves at every step, with all that it leaves out fed back."""

import optax

from optax_structured.low_rank.ldadam import scale_by_ldadam
from optax_structured.low_rank.spec import LowRank
from optax_structured.recipes.descent import decoupled, descent
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms import skip_nonfinite
from optax_structured.trees import Rules


def ldadam(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules,
    *,
    b1: ScalarOrSchedule = 0.908,
    b2: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    rho: ScalarOrSchedule = 0.908,
    error_feedback: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam: AdamW in a subspace that follows momentum and gradient at every step.

    .. math:: W \leftarrow (1 - \eta d) W
        - \eta P \frac{\hat M}{\sqrt{\hat V} + \epsilon}

    with the basis P, the moments, and the error feedback of `scale_by_ldadam`, and AdamW for leaves
    that are not projected. It does not depend on the signs of its bases. State of a matrix of p x q
    entries, q the smaller: :math:`q r + 2 p r` numbers, and :math:`p q` more for the error.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; as for AdamW.
      low_rank: a `LowRank`, or `rules` of them, rank 16 to a quarter of the width. Its projector is
        one warm step of subspace iteration from the SVD of the first gradient; `SVD()` is the
        costly alternative. Period, refresh, residual and transport are LDAdam's own.
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to its corrected root, a number or schedule.
      weight_decay: d, decoupled, a number or schedule.
      rho: share of the momentum in what the subspace is fitted to, in [0, 1), a number or schedule.
      error_feedback: keep what a step leaves out for the next.

    Returns:
      An optimizer that needs `params` for weight decay only.

    Raises:
      TypeError, ValueError: a value out of range, a `LowRank` with a part that LDAdam prescribes,
        or as `low_rank_projection`.

    Equals `optax.adamw` for leaves that are not projected.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.ldadam(1e-3, oxs.LowRank(rank=2), weight_decay=0.01)
      >>> state = optimizer.init({"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)})

    References:
      Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics
      <https://arxiv.org/abs/2410.16103>`_, ICLR 2025.
    """
    return skip_nonfinite(
        scale_by_ldadam(low_rank, b1=b1, b2=b2, eps=eps, rho=rho, error_feedback=error_feedback),
        decoupled(weight_decay),
        descent(learning_rate),
    )
