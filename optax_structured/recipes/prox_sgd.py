"""Proximal SGD: with unit step, and as first published, relaxed and in a diagonal metric."""

import jax.numpy as jnp
import optax

from optax_structured.proximal.averaging import moving_average
from optax_structured.proximal.preconditioners import adam_preconditioner
from optax_structured.proximal.prox_step import prox_step
from optax_structured.proximal.solvers import Exact, Solver
from optax_structured.proximal.target import TargetSparsity
from optax_structured.recipes.averaging import complement, recorded, scale
from optax_structured.recipes.end_of_chain import closed_chain
from optax_structured.regularizers.base import Regularizer
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.trees import Rules
from optax_structured.trees.checks import check_fraction, check_nonnegative


def prox_sgd(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | TargetSparsity | None = None,
    *,
    momentum: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Proximal SGD with momentum and unit step: the baseline of the RAMDA and RMDA papers.

    .. math::
        m_t = \mu m_{t-1} + (1 - \mu) G_t, \qquad
        W_t = \operatorname{prox}_{\eta\lambda\psi}(W_{t-1} - \eta m_t)

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 0.1 for vision.
      regularizer: :math:`\psi`, a `Regularizer` or `rules` of them, None for none.
      strength: :math:`\lambda`, a number, schedule or `TargetSparsity`; the threshold is
        :math:`\eta\lambda`.
      momentum: :math:`\mu` in [0, 1), a number or schedule; the average is not debiased.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain. The
      parameters are exactly structured at every step, but the structure keeps changing: noise in
      :math:`m` does not vanish.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.sgd` on the moving average of the gradients, without regularizer.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.prox_sgd(0.1, oxs.L1(), strength=100.0)
      >>> params = jnp.ones(3)
      >>> updates, _ = optimizer.update(jnp.ones(3), optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0. 0. 0.]

    References:
      Yang et al., `ProxSGD <https://openreview.net/forum?id=HygpthEtvr>`_, ICLR 2020, is the
      relaxed `prox_sgd_relaxed`; this is the variant of the comparisons in
      `arXiv:2403.14398 <https://arxiv.org/abs/2403.14398>`_.
    """
    check_fraction("momentum", momentum)
    return closed_chain(
        moving_average(learning_rate, momentum, debias=False),
        prox_step(regularizer, strength),
    )


def prox_sgd_relaxed(
    learning_rate: ScalarOrSchedule | None = None,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | TargetSparsity | None = None,
    *,
    momentum: ScalarOrSchedule | None = None,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    solver: Solver = Exact(),  # noqa: B008  (frozen)
    keep_point: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""ProxSGD as published by Yang et al.: a relaxed step towards the prox in a diagonal metric.

    With :math:`\rho_t` the weight of the new gradient and :math:`\varepsilon_t` the step,

    .. math::
        v_t &= (1-\rho_t) v_{t-1} + \rho_t G_t, \quad r_t = b_2 r_{t-1} + (1-b_2) G_t^2, \quad
            P_t = \sqrt{r_t / (1 - b_2^{t+1})} + \epsilon \\
        \hat W_t &= \arg\min_w \langle v_t, w\rangle
            + \tfrac12 \langle w - W_{t-1}, P_t (w - W_{t-1})\rangle + \lambda\psi(w) \\
        W_t &= W_{t-1} + \varepsilon_t (\hat W_t - W_{t-1})

    Args:
      learning_rate: :math:`\varepsilon_t` in (0, 1], a number or schedule; None is the published
        :math:`0.06 / \sqrt{t + 4}` with t from 1.
      regularizer: :math:`\psi`, a `Regularizer` or `rules` of them, None for none.
      strength: :math:`\lambda`, a number, schedule or `TargetSparsity`; published 1e-4 for l1.
      momentum: :math:`1 - \rho_t`, a number or schedule; None is the published
        :math:`1 - 0.9 / \sqrt{t + 4}`.
      b2: decay of the mean square, in [0, 1), a number or schedule.
      eps: added to its root, above 0, a number or schedule.
      solver: of the subproblem in the metric P.
      keep_point: record :math:`\hat W`, which alone is exactly structured, for `prox_point`.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `prox_sgd` with learning rate 1 in another metric, for a step :math:`\varepsilon_t = 1`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.prox_sgd_relaxed(regularizer=oxs.L1(), strength=1e-4)
      >>> state = optimizer.init(jnp.ones(3))

    References:
      Yang et al., `ProxSGD: Training Structured Neural Networks under Regularization and
      Constraints <https://openreview.net/forum?id=HygpthEtvr>`_, ICLR 2020. The exponent t + 1 is
      that of the authors' PyTorch code.
    """
    rate = _published_decay(0.06) if learning_rate is None else learning_rate
    keep = complement(_published_decay(0.9)) if momentum is None else momentum
    check_nonnegative("learning_rate", rate)
    check_fraction("momentum", keep)
    return closed_chain(
        moving_average(1.0, keep, debias=False),
        adam_preconditioner(b2, eps, head_start=1),
        prox_step(regularizer, strength, solver=solver),
        *recorded(keep_point),
        scale(rate),
    )


def _published_decay(start: float) -> optax.Schedule:
    """start / sqrt(t + 4), with t = 1 at the first step."""
    return lambda count: start / jnp.sqrt(jnp.asarray(count, float) + 5)
