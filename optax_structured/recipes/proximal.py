"""Proximal optimizers: training that ends exactly sparse or exactly low rank."""

from typing import Any

import jax.numpy as jnp
import optax

from optax_structured.checks import check_fraction, check_nonnegative
from optax_structured.proximal.averaging import dual_averaging, moving_average
from optax_structured.proximal.clock import ScalarOrSchedule
from optax_structured.proximal.preconditioners import adam_preconditioner, adaptive_preconditioner
from optax_structured.proximal.prox_step import prox_step, record_point
from optax_structured.proximal.solvers import Exact, Solver
from optax_structured.regularizers.base import Regularizer
from optax_structured.trees import Rules

_EXACT = Exact()


def ramda(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | None = None,
    *,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    solver: Solver = _EXACT,
    keep_point: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RAMDA: dual averaging in an adaptive metric, with an exact prox and momentum.

    With :math:`s_t = \eta\sqrt t` and :math:`c = 1 - momentum`, for each leaf

    .. math::
        V_t &= V_{t-1} + s_t G_t, \quad U_t = U_{t-1} + s_t G_t^2, \quad
            \alpha_t = \alpha_{t-1} + s_t \\
        P_t &= \sqrt[3]{U_t} + \epsilon \\
        \hat W_t &= \arg\min_w \langle V_t, w\rangle
            + \tfrac12\langle w - W_0, P_t (w - W_0)\rangle + \alpha_t\lambda\,\psi(w) \\
        W_t &= (1 - c) W_{t-1} + c\,\hat W_t

    The zeros of :math:`\hat W` settle on those of the optimum after finitely many steps; those of
    :math:`W` follow once momentum is 0. Give it the gradients of the loss alone. The state holds
    three copies of the parameters, float32 at least.

    Args:
      learning_rate: :math:`\eta`, a number or schedule, 1e-3 to 5e-2 (1e-2 for vision). Constant
        between restarts: see `Stages` and `restart_at`.
      regularizer: :math:`\psi`, a `Regularizer` or `rules` of them, None for none.
      strength: :math:`\lambda`, a number or schedule, in units of the loss per unit of
        :math:`\psi`, whatever the learning rate. Published runs with group lasso: 1e-7 to 1e-3
        (its weight sqrt(group size) is part of :math:`\psi`).
      momentum: share of the previous iterate that is kept, in [0, 1), a number or schedule. The
        published c is 1 - momentum: 0.9 to 0.99.
      eps: added outside the root, above 0, a number or schedule, 1e-8 to 1e-4.
      solver: of the subproblem in the metric P. `ProximalGradient()` reproduces published runs.
      keep_point: record :math:`\hat W` in the state, for `prox_point`: one more copy.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of the ranges above.

    Equals MADGRAD without regularizer: `optax.contrib.madgrad(learning_rate - eps)` with the same
    momentum and eps (MADGRAD adds its eps to its learning rate; RAMDA does not).

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structured as oxs
      >>> A, y = jnp.eye(4)[:, ::-1], jnp.array([2.0, 0.1, 0.1, 1.0])
      >>> gradient = jax.grad(lambda w: 0.5 * jnp.sum((A @ w - y) ** 2))
      >>> optimizer = oxs.ramda(0.1, oxs.L1(), strength=0.5, momentum=0.0)
      >>> w, state = jnp.zeros(4), optimizer.init(jnp.zeros(4))
      >>> for _ in range(1000):
      ...     updates, state = optimizer.update(gradient(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w.round(2))
      [0.5 0.  0.  1.5]

    References:
      Huang and Lee, `Regularized Adaptive Momentum Dual Averaging with an Efficient Inexact
      Subproblem Solver for Training Structured Neural Network
      <https://arxiv.org/abs/2403.14398>`_, NeurIPS 2024. Corrections: the prox of its Algorithm 2
      is scaled by the step size; the inner solver starts from the current parameters.
    """
    return optax.chain(
        dual_averaging(learning_rate),
        adaptive_preconditioner(eps),
        prox_step(regularizer, strength, solver=solver),
        *_averaged(momentum, keep_point),
    )


def rmda(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | None = None,
    *,
    momentum: ScalarOrSchedule = 0.9,
    keep_point: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RMDA: dual averaging in the metric :math:`\sqrt t`, with a closed-form prox and momentum.

    With the :math:`V_t, \alpha_t, c` of `ramda`,

    .. math::
        \hat W_t = \operatorname{prox}_{(\alpha_t/\sqrt t)\,\lambda\psi}(W_0 - V_t/\sqrt t), \qquad
        W_t = (1 - c) W_{t-1} + c\,\hat W_t .

    Args:
      learning_rate: :math:`\eta`, a number or schedule: 0.1 for small vision, 1 to 25 for large
        tasks. Constant between restarts: see `Stages` and `restart_at`.
      regularizer: :math:`\psi`, a `Regularizer` or `rules` of them, None for none.
      strength: :math:`\lambda`, a number or schedule; published 1e-5 to 2e-4 for CNNs.
      momentum: share of the previous iterate that is kept, in [0, 1), a number or schedule. The
        published c is 1 - momentum: 0.9 to 0.99.
      keep_point: record :math:`\hat W` in the state, for `prox_point`: one more copy.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of the ranges above.

    Equals, without regularizer and momentum, modernized dual averaging:
    :math:`W_t = W_0 - \eta t^{-1/2} \sum_k \sqrt k\,G_k`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.rmda(0.1, oxs.GroupLasso(group_axis=-2), strength=1e-3)
      >>> state = optimizer.init({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)})

    References:
      Huang and Lee, `Training Structured Neural Networks Through Manifold Identification and
      Variance Reduction <https://arxiv.org/abs/2112.02612>`_, ICLR 2022. Its code advances the
      counters of the last parameter group only; here they belong to the optimizer.
    """
    return optax.chain(
        dual_averaging(learning_rate),
        prox_step(regularizer, strength),
        *_averaged(momentum, keep_point),
    )


def prox_sgd(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | None = None,
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
      strength: :math:`\lambda`, a number or schedule; the threshold is :math:`\eta\lambda`.
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
    return optax.chain(
        moving_average(learning_rate, momentum, debias=False),
        prox_step(regularizer, strength),
    )


def prox_sgd_relaxed(
    learning_rate: ScalarOrSchedule | None = None,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | None = None,
    *,
    momentum: ScalarOrSchedule | None = None,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    solver: Solver = _EXACT,
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
      strength: :math:`\lambda`, a number or schedule; published 1e-4 for l1.
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
    keep = _complement(_published_decay(0.9)) if momentum is None else momentum
    check_nonnegative("learning_rate", rate)
    return optax.chain(
        moving_average(1.0, keep, debias=False),
        adam_preconditioner(b2, eps, head_start=1),
        prox_step(regularizer, strength, solver=solver),
        *_recorded(keep_point),
        _scale(rate),
    )


def prox_adam(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | None = None,
    *,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
    solver: Solver = _EXACT,
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
      strength: :math:`\lambda`, a number or schedule; published 1e-7 to 1e-3.
      b1: decay of the mean, in [0, 1), a number or schedule.
      b2: decay of the mean square, in [0, 1), a number or schedule.
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
    return optax.chain(
        moving_average(learning_rate, b1, weight_decay=weight_decay),
        adam_preconditioner(b2, eps, amsgrad=amsgrad),
        prox_step(regularizer, strength, solver=solver),
    )


def prox_ssi(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | None = None,
    *,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    solver: Solver = _EXACT,
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
      strength: :math:`\lambda`, a number or schedule; published 1e-7 to 1e-3.
      b1: decay of the mean, in [0, 1), a number or schedule.
      b2: decay of the mean square, in [0, 1), a number or schedule.
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

    def at(scalar: Any, count: Any) -> Any:
        return scalar(count) if callable(scalar) else scalar

    def rate(count: Any) -> Any:
        eta = at(learning_rate, count)
        correction = jnp.sqrt(1 - at(b2, count) ** jnp.asarray(count + 1, float))
        return eta * correction * (1 - eta * at(weight_decay, count))

    check_nonnegative("learning_rate", learning_rate)
    return optax.chain(
        moving_average(rate, b1, weight=learning_rate, weight_decay=weight_decay),
        adam_preconditioner(b2, eps, debias=False),
        prox_step(regularizer, strength, solver=solver),
    )


def _averaged(
    momentum: ScalarOrSchedule, keep_point: bool
) -> tuple[optax.GradientTransformation, ...]:
    """Keeps the share `momentum` of the previous iterate."""
    check_fraction("momentum", momentum)
    return *_recorded(keep_point), _scale(_complement(momentum))


def _recorded(keep_point: bool) -> tuple[optax.GradientTransformation, ...]:
    return (record_point(),) if keep_point else ()


def _complement(scalar: ScalarOrSchedule) -> ScalarOrSchedule:
    if callable(scalar):
        return lambda count: 1 - scalar(count)
    return 1 - scalar


def _scale(factor: ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.scale_by_schedule(factor) if callable(factor) else optax.scale(factor)


def _published_decay(start: float) -> optax.Schedule:
    """start / sqrt(t + 4), with t = 1 at the first step."""
    return lambda count: start / jnp.sqrt(jnp.asarray(count, float) + 5)
