"""RAMDA and RMDA: dual averaging, which finds the structure of the optimum for good."""

import optax

from optax_structured.proximal.averaging import dual_averaging
from optax_structured.proximal.preconditioners import adaptive_preconditioner
from optax_structured.proximal.prox_step import prox_step
from optax_structured.proximal.restart import restart_at
from optax_structured.proximal.solvers import Exact, Solver
from optax_structured.proximal.target import TargetSparsity
from optax_structured.recipes.averaging import averaged
from optax_structured.recipes.end_of_chain import closed_chain
from optax_structured.regularizers.base import Regularizer
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.step_sizes.stages import Stages, check_stages
from optax_structured.trees import Rules
from optax_structured.trees.checks import check_nonnegative, check_positive


def ramda(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | TargetSparsity | None = None,
    *,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    stages: Stages | None = None,
    solver: Solver = Exact(),  # noqa: B008  (frozen)
    keep_point: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RAMDA: dual averaging in an adaptive metric, with an exact prox and momentum.

    To end with exact zeros in the parameters, say how long you train:
    `stages=Stages.equal(total_steps)`. With a constant momentum above 0 they never have one, only
    their prox point has: `prox_point(state, regularizer)`. `momentum=0.0` has them at every step.

    With :math:`s_t = \eta\sqrt t` and :math:`c = 1 - momentum`, for each leaf

    .. math::
        V_t &= V_{t-1} + s_t G_t, \quad U_t = U_{t-1} + s_t G_t^2, \quad
            \alpha_t = \alpha_{t-1} + s_t \\
        P_t &= \sqrt[3]{U_t} + \epsilon \\
        \hat W_t &= \arg\min_w \langle V_t, w\rangle
            + \tfrac12\langle w - W_0, P_t (w - W_0)\rangle + \alpha_t\lambda\,\psi(w) \\
        W_t &= (1 - c) W_{t-1} + c\,\hat W_t

    The zeros of :math:`\hat W` settle on those of the optimum after finitely many steps; those of
    :math:`W`, the parameters, follow once momentum is 0. Give it the gradients of the loss alone.
    The state holds three copies of the parameters, float32 at least.

    Args:
      learning_rate: :math:`\eta`, a number or schedule, 1e-3 to 5e-2 (1e-2 for vision). Constant
        within a stage.
      regularizer: :math:`\psi`, a `Regularizer` or `rules` of them, None for none.
      strength: :math:`\lambda`, a number, schedule or `TargetSparsity`, in units of the loss per
        unit of :math:`\psi`, independent of the learning rate. Published runs with group lasso:
        1e-7 to 1e-3 (its weight sqrt(group size) is part of :math:`\psi`).
      momentum: share of the previous iterate that is kept, in [0, 1), a number or schedule. The
        published c is 1 - momentum: 0.9 to 0.99.
      eps: added outside the root, above 0, a number or schedule, 1e-8 to 1e-4.
      stages: of the run: restarts, lower rates, and momentum down to 0 in the last of them.
      solver: of the subproblem in the metric P. `ProximalGradient()` reproduces published runs.
      keep_point: keep the very point of an inexact solver (or with state in codes) for
        `prox_point`: one more copy. With `Exact` the state tells it.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of the ranges above; a momentum that the last stage is too short for.

    Equals MADGRAD without regularizer: `optax.contrib.madgrad(learning_rate - eps)` with the same
    momentum and eps (MADGRAD adds its eps to its learning rate; RAMDA does not).

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structured as oxs
      >>> A, y = jnp.eye(4)[:, ::-1], jnp.array([2.0, 0.1, 0.1, 1.0])
      >>> gradient = jax.grad(lambda w: 0.5 * jnp.sum((A @ w - y) ** 2))
      >>> optimizer = oxs.ramda(0.1, oxs.L1(), strength=0.5, stages=oxs.Stages.equal(1000, 2))
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
    check_positive("eps", eps)
    check_nonnegative("learning_rate", learning_rate)
    check_stages(stages)
    if stages is not None:
        learning_rate, eps = stages.decay(learning_rate), stages.decay(eps)
        momentum = stages.momentum(momentum)
    steps = closed_chain(
        dual_averaging(learning_rate),
        adaptive_preconditioner(eps),
        prox_step(regularizer, strength, solver=solver),
        *averaged(momentum, keep_point),
    )
    return restart_at(steps, stages.milestones) if stages is not None else steps


def rmda(
    learning_rate: ScalarOrSchedule,
    regularizer: Regularizer | Rules | None = None,
    strength: ScalarOrSchedule | TargetSparsity | None = None,
    *,
    momentum: ScalarOrSchedule = 0.9,
    stages: Stages | None = None,
    keep_point: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RMDA: dual averaging in the metric :math:`\sqrt t`, with a closed-form prox and momentum.

    As with `ramda`, exact zeros in the parameters need `stages=Stages.equal(total_steps)`.

    With the :math:`V_t, \alpha_t, c` of `ramda`,

    .. math::
        \hat W_t = \operatorname{prox}_{(\alpha_t/\sqrt t)\,\lambda\psi}(W_0 - V_t/\sqrt t), \qquad
        W_t = (1 - c) W_{t-1} + c\,\hat W_t .

    Args:
      learning_rate: :math:`\eta`, a number or schedule: 0.1 for small vision, 1 to 25 for large
        tasks. Constant within a stage.
      regularizer: :math:`\psi`, a `Regularizer` or `rules` of them, None for none.
      strength: :math:`\lambda`, a number, schedule or `TargetSparsity`; published 1e-5 to
        2e-4 for CNNs.
      momentum, stages: as in `ramda`.
      keep_point: keep :math:`\hat W` in the state, for `prox_point`, where the sums are in codes.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain.

    Raises:
      ValueError: a value out of the ranges above; a momentum that the last stage is too short for.

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
    check_nonnegative("learning_rate", learning_rate)
    check_stages(stages)
    if stages is not None:
        learning_rate, momentum = stages.decay(learning_rate), stages.momentum(momentum)
    steps = closed_chain(
        dual_averaging(learning_rate),
        prox_step(regularizer, strength),
        *averaged(momentum, keep_point),
    )
    return restart_at(steps, stages.milestones) if stages is not None else steps
