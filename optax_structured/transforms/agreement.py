"""Do the gradients of successive steps agree on a sign? A monitor that changes nothing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.states.roles import FirstMoment
from optax_structured.trees.checks import check_fraction
from optax_structured.trees.paths import is_hole
from optax_structured.trees.precision import at_least_float32, scalar_dtype
from optax_structured.trees.tree_checks import check_real, check_same_tree


class SignAgreementState(NamedTuple):
    """State of `sign_agreement`."""

    clock: Clock  # steps since init, for schedules
    total: jax.Array  # () float32 or wider: what the decay averages ones to
    signs: FirstMoment[Any]  # like params, float32 or wider: moving average of signs
    agreement: jax.Array  # () in [0, 1]: mean over entries of |average sign|, after each step


def sign_agreement(decay: ScalarOrSchedule = 0.9) -> optax.GradientTransformationExtraArgs:
    r"""Passes gradients through, and records how far recent ones agree on signs.

    .. math:: S_t = b\,S_{t-1} + (1-b) \operatorname{sign} G_t, \qquad
        a_t = \frac1D \sum_k \frac{|S_{t,k}|}{1 - b^t}

    1 where all recent gradients have the same signs. Independent random signs give about
    :math:`\sqrt{2/\pi}\,\sqrt{(1-b)/(1+b)}`, 0.18 for the default: near that, sign-based steps
    (Lion, signSGD, Adam with a small learning rate) mostly walk at random, and a larger batch or a
    smaller rate pays. Put it first in a chain, where it sees raw gradients.

    Args:
      decay: b in [0, 1), a number or schedule: the memory is about 1/(1-b) steps.

    Returns:
      An element that returns its updates unchanged and needs no `params`. Its state is
      `SignAgreementState`; read `agreement` from it, for instance with `optax.tree.get`.

    Raises:
      ValueError: a decay outside [0, 1).

    Equals `optax.identity` in its updates. Zeros and NaN have no sign and count as 0.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> monitor = oxs.sign_agreement(decay=0.5)
      >>> state = monitor.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([3.0, 1.0]), jnp.array([0.1, -1.0])):
      ...     updates, state = monitor.update(gradient, state)
      >>> print(f"{state.agreement:.3f}")  # the mean of 1 and 1/3
      0.667

    References:
      Zhang and Jia, `GradSign <https://arxiv.org/abs/2110.08616>`_, 2022, score networks by the
      same sums over examples before training: `contrib.scores.gradsign`.
    """
    check_fraction("decay", decay)

    def init(params: Any) -> SignAgreementState:
        check_real("sign_agreement", params)
        dtype = scalar_dtype(params)
        signs = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        return SignAgreementState(new_clock(), jnp.zeros((), dtype), signs, jnp.zeros((), dtype))

    def update(
        updates: Any, state: SignAgreementState, params: Any = None, **_: Any
    ) -> tuple[Any, SignAgreementState]:
        check_same_tree("sign_agreement", updates, state.signs)
        dtype = state.total.dtype
        share = jnp.asarray(now(decay, state.clock), dtype)
        total = share * state.total + (1 - share)

        def average(gradient: Any, signs: Any) -> Any:
            if is_hole(gradient):
                return signs
            sign = jnp.nan_to_num(jnp.sign(gradient)).astype(signs.dtype)
            keep = share.astype(signs.dtype)
            return keep * signs + (1 - keep) * sign

        signs = jax.tree.map(average, updates, state.signs, is_leaf=is_hole)
        leaves = jax.tree.leaves(signs)
        size = max(sum(s.size for s in leaves), 1)
        strength = sum((jnp.sum(jnp.abs(s)).astype(dtype) for s in leaves), jnp.zeros((), dtype))
        agreement = strength / (total * size)
        return updates, SignAgreementState(tick(state.clock), total, signs, agreement)

    return optax.GradientTransformationExtraArgs(init, update)
