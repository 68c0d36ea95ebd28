"""Proximal Adam: the prox in the metric of the optimizer itself."""

from typing import Any

import jax.numpy as jnp
import optax

from optax_structured.proximal.averaging import moving_average
from optax_structured.proximal.preconditioners import adam_preconditioner
from optax_structured.proximal.prox_step import prox_step
from optax_structured.proximal.solvers import Exact, Solver
from optax_structured.proximal.target import TargetSparsity
from optax_structured.recipes.end_of_chain import closed_chain
from optax_structured.regularizers.base import Regularizer
from optax_structured.states.clock import Clock, ScalarOrSchedule, now
from optax_structured.trees import Rules
from optax_structured.trees.checks import check_fraction, check_nonnegative


def prox_adam(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | TargetSparsity | None = None,
    *,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
    solver: Solver = Exact(),  # noqa: B008  (frozen)
) -> optax.GradientTransformationExtraArgs:
    r"""ProxGen with Adam's metric (ProxAdamW): the prox in the metric of the optimizer itself.

    With the debiased moments :math:`\hat m, \hat v` of Adam and weight decay :math:`d`,

    .. math::
        P_t &= \sqrt{\hat v_t} + \epsilon, \qquad \bar W = (1 - \eta d) W_{t-1} \\
        W_t &= \arg\min_w \langle \eta\hat m_t, w\rangle
            + \tfrac12 \langle w - \bar W, P_t (w - \bar W)\rangle + \eta\lambda\,\psi(w)

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 1e-3.
      regularizer: :math:`\psi`, a `Regularizer` or `rules` of them, None for none.
      strength: :math:`\lambda`, a number, schedule or `TargetSparsity`; published 1e-7 to 1e-3.
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to its root, above 0, a number or schedule. Entries that never received a gradient
        have this metric only, so any penalty zeroes them at the first step.
      weight_decay: d, decoupled and before the step, so that it moves the centre of the prox; a
        number or schedule.
      amsgrad: take the largest mean square so far.
      solver: of the subproblem in the metric P.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.adamw` without regularizer.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.prox_adam(1e-3, oxs.GroupLasso(group_axis=-2), strength=1e-3)
      >>> state = optimizer.init({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)})

    References:
      Yun, Lozano and Yang, `Adaptive Proximal Gradient Methods for Structured Neural Networks
      <https://arxiv.org/abs/2007.07484>`_, NeurIPS 2021. Their l1/2 code shifts its argument by
      1e-4 and their l2/3 can give NaN; ours is exact.
    """
    check_fraction("b1", b1)
    return closed_chain(
        moving_average(learning_rate, b1, weight_decay=weight_decay),
        adam_preconditioner(b2, eps, amsgrad=amsgrad),
        prox_step(regularizer, strength, solver=solver),
    )


def prox_ssi(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | TargetSparsity | None = None,
    *,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    solver: Solver = Exact(),  # noqa: B008  (frozen)
) -> optax.GradientTransformationExtraArgs:
    r"""ProxSSI: Adam with a prox in the uncorrected metric, for comparison with published runs.

    .. math::
        D_t &= \sqrt{v_t} + \epsilon, \qquad
        x_t = (1 - \eta d)\Big(W_{t-1} - \eta \frac{\sqrt{1-b_2^t}}{1-b_1^t} \frac{m_t}{D_t}\Big) \\
        W_t &= \arg\min_w \tfrac12 \langle w - x_t, D_t (w - x_t)\rangle + \eta\lambda\,\psi(w)

    The prox weighs :math:`\psi` by :math:`\eta` where the step has the corrected size, so early on
    the effective strength is off by the ratio; `prox_adam` is consistent and recommended.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 1e-3.
      regularizer: :math:`\psi`, `GroupLasso` or `GroupMCP` in the paper; None for none.
      strength: :math:`\lambda`, a number, schedule or `TargetSparsity`; published 1e-7 to 1e-3.
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to its uncorrected root, above 0, a number or schedule.
      weight_decay: d, decoupled, after the step and before the prox; a number or schedule.
      solver: of the subproblem in the metric D.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.adam` without regularizer, but for eps, which is larger here by
    :math:`(1-b_2^t)^{-1/2}`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.prox_ssi(1e-3, oxs.GroupLasso(group_axis=-2), strength=1e-3)
      >>> state = optimizer.init(jnp.ones((4, 3)))

    References:
      Deleu and Bengio, `Structured Sparsity Inducing Adaptive Optimizers for Deep Learning
      <https://arxiv.org/abs/2102.03869>`_, 2021. Its Newton iteration needs up to 100 steps where
      ours takes a handful.
    """

    def rate(count: Any) -> Any:
        eta, decay, shrink = (now(x, Clock(count)) for x in (learning_rate, b2, weight_decay))
        correction = jnp.sqrt(1 - decay ** jnp.asarray(count + 1, float))
        return eta * correction * (1 - eta * shrink)

    check_nonnegative("learning_rate", learning_rate)
    check_fraction("b1", b1)
    return closed_chain(
        moving_average(rate, b1, weight=learning_rate, weight_decay=weight_decay),
        adam_preconditioner(b2, eps, debias=False),
        prox_step(regularizer, strength, solver=solver),
    )
