"""MADGRAD and MirrorMADGRAD: adaptive dual averaging and its mirror descent, without a penalty."""

from typing import Any

import jax.numpy as jnp
import optax

from optax_structured.proximal.averaging import dual_averaging
from optax_structured.proximal.preconditioners import adaptive_preconditioner
from optax_structured.proximal.prox_step import prox_step
from optax_structured.recipes.averaging import averaged, combined
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms import primal_averaging, scale_by_mirror_madgrad, skip_nonfinite
from optax_structured.trees.checks import check_nonnegative


def madgrad(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""MADGRAD: dual averaging in a cube-root metric, with momentum.

    With :math:`\eta' = \eta + \epsilon` (0 for :math:`\eta = 0`), :math:`s_t = \eta'\sqrt t` and
    :math:`c = 1 - momentum`, after :math:`G_t \leftarrow G_t + d\,W_{t-1}`,

    .. math::
        V_t = V_{t-1} + s_t G_t, \quad U_t = U_{t-1} + s_t G_t^2, \quad
        W_t = (1-c)\, W_{t-1} + c\,\Big(W_0 - \frac{V_t}{\sqrt[3]{U_t} + \epsilon}\Big)

    Args:
      learning_rate: :math:`\eta`, a number or schedule: 2.5e-4 to 1e-3 for vision, 5e-3 to 2.5e-2
        for language.
      momentum: share of the previous parameters that is kept, in [0, 1), a number or schedule.
      eps: added outside the root, at least 0, a number or schedule. At 0, entries that never
        received a gradient stay where they are.
      weight_decay: d, a number or schedule; lower than usual, often 0.
      decoupled: subtract :math:`\eta' d\, W_{t-1}` from the parameters after the step, and leave
        the gradient alone.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain. The
      state holds three copies of the parameters, float32 at least.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `ramda(learning_rate + eps, momentum=momentum, eps=eps)` without decay, and
    `optax.contrib.madgrad` up to the precision of its counters (and at a learning rate of 0, which
    there still moves parameters by eps).

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.madgrad(1e-3, momentum=0.0, eps=0.0)
      >>> params = jnp.ones(2)
      >>> updates, _ = optimizer.update(jnp.array([1.0, 0.0]), optimizer.init(params), params)
      >>> print(updates.round(3))  # a first step of (learning rate^2 * gradient)^(1/3)
      [-0.01  0.  ]

    References:
      Defazio and Jelassi, `Adaptivity without Compromise
      <https://arxiv.org/abs/2101.11075>`_, JMLR 2022. Adding eps to the learning rate is in its
      code only.
    """
    check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("eps", eps)
    check_nonnegative("weight_decay", weight_decay)
    rate = combined(_raised, learning_rate, eps)
    steps = (
        dual_averaging(rate),
        adaptive_preconditioner(eps),
        prox_step(),
        *averaged(momentum, keep_point=False),
    )
    if not decoupled:
        return skip_nonfinite(optax.add_decayed_weights(weight_decay), *steps)
    shrunk = combined(lambda rate, decay: -rate * decay, rate, weight_decay)
    return skip_nonfinite(*steps, optax.add_decayed_weights(shrunk))


def mirror_madgrad(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""MirrorMADGRAD: the mirror descent of MADGRAD, which its author prefers for transformers.

    With :math:`\eta'`, c and the decayed gradient of `madgrad`, and k = 1, 2, ... the number of
    steps,

    .. math::
        U_k &= \sqrt{\tfrac{k-1}{k}}\, U_{k-1} + G_k^2 \\
        z_k &= z_{k-1} - \eta'\,\frac{\sqrt[3]{k}\; G_k}{\sqrt[3]{U_k} + \epsilon}, \qquad
        W_k = (1-c)\, W_{k-1} + c\, z_k

    Args:
      learning_rate: :math:`\eta`, a number or schedule.
      momentum: share of the previous parameters that is kept, in [0, 1), a number or schedule.
      eps: added outside the root, at least 0, a number or schedule.
      weight_decay: d, a number or schedule.
      decoupled: shrink z by :math:`1 - \eta' d` before the step, and leave the gradient alone.

    Returns:
      An optimizer whose update needs `params`, and after which nothing may follow in a chain. The
      state holds two copies of the parameters, float32 at least.

    Raises:
      ValueError: a value out of the ranges above.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.mirror_madgrad(0.5, momentum=0.0)
      >>> params = jnp.ones(2)
      >>> updates, _ = optimizer.update(jnp.array([8.0, 0.0]), optimizer.init(params), params)
      >>> print(updates.round(3))
      [-1.  0.]

    References:
      Defazio and Jelassi, `Adaptivity without Compromise
      <https://arxiv.org/abs/2101.11075>`_, JMLR 2022; the algorithm is that of its code.
    """
    check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("weight_decay", weight_decay)
    mirror, decay = scale_by_mirror_madgrad(eps), optax.add_decayed_weights(weight_decay)
    descent = optax.scale_by_learning_rate(combined(_raised, learning_rate, eps))
    if not decoupled:
        return skip_nonfinite(decay, primal_averaging(optax.chain(mirror, descent), momentum))
    return skip_nonfinite(primal_averaging(optax.chain(mirror, decay, descent), momentum))


def _raised(learning_rate: Any, eps: Any) -> Any:
    """The learning rate plus eps, as in the published code; 0 stays 0."""
    if isinstance(learning_rate, int | float):
        return learning_rate + eps if learning_rate else 0.0
    return jnp.where(learning_rate == 0, 0, learning_rate + eps)
