"""diffGrad: Adam with friction where gradients have stopped changing."""

from typing import Literal

import optax

from optax_structured.recipes.descent import decoupled, descent
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms import Friction, scale_by_diffgrad, skip_nonfinite
from optax_structured.trees.checks import check_nonnegative


def diffgrad(
    learning_rate: ScalarOrSchedule,
    *,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    l2: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    friction: Friction = "abs_sigmoid",
    eps_form: Literal["code", "paper"] = "code",
) -> optax.GradientTransformationExtraArgs:
    r"""DiffGrad: Adam whose steps are damped where the gradient has stopped changing.

    With :math:`G_t \leftarrow G_t + \lambda W_{t-1}` and Adam's moments M and V of it,

    .. math:: W_t = (1 - \eta d) W_{t-1} - \eta\, \frac{\sqrt{1-b_2^t}}{1-b_1^t} \cdot
        \frac{\sigma(|G_{t-1} - G_t|) \odot M_t}{\sqrt{V_t} + \epsilon}

    Gradients far below 1 make it Adam at half the learning rate; expect to tune about twice Adam's.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; 1e-3.
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to the root, in the unit of the gradient, a number or schedule.
      l2: :math:`\lambda`, added to the gradient before everything, as published; a number or
        schedule.
      weight_decay: d, decoupled as in AdamW, a number or schedule.
      friction: see `gradient_friction`.
      eps_form: see `scale_by_diffgrad`.

    Returns:
      An optimizer whose update needs `params`. Its state is three copies of the parameters.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.adamw` for a friction of 1, the paper's form and no l2.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.diffgrad(1e-3)
      >>> state = optimizer.init(jnp.ones(3))

    References:
      Dubey et al., `diffGrad: An Optimization Method for Convolutional Neural Networks
      <https://arxiv.org/abs/1909.11015>`_, 2020. Code and paper add eps in different places.
    """
    check_nonnegative("l2", l2)
    return skip_nonfinite(
        optax.add_decayed_weights(l2),
        scale_by_diffgrad(b1, b2, eps, friction=friction, eps_form=eps_form),
        decoupled(weight_decay),
        descent(learning_rate),
    )
