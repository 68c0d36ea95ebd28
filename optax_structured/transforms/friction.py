"""Friction: updates are damped, entry by entry, where the gradient has stopped changing."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, tick
from optax_structured.states.roles import Estimate
from optax_structured.transforms.adam import bias_correction, debiased_adam, uncorrected_adam
from optax_structured.trees.paths import is_hole
from optax_structured.trees.precision import as_updates, at_least_float32
from optax_structured.trees.tree_checks import check_real, check_same_tree

Friction = (
    Literal["abs_sigmoid", "sigmoid", "wide_sigmoid", "legacy_alias"]
    | Callable[[jax.Array], jax.Array]
)

# Of d, the last gradient minus this one.
_FRICTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "abs_sigmoid": lambda d: jax.nn.sigmoid(jnp.abs(d)),
    "sigmoid": jax.nn.sigmoid,
    "wide_sigmoid": lambda d: 9 * jax.nn.sigmoid(0.5 * jnp.abs(d)) - 4,
    "legacy_alias": lambda d: jax.nn.sigmoid(jnp.abs(d)),
}


class GradientFrictionState(NamedTuple):
    """State of `gradient_friction`."""

    clock: Clock  # steps since init
    previous: Estimate[Any]  # like params, float32 or wider: the last gradient, 0 before the first
    inner_state: Any  # of the wrapped transformation


def gradient_friction(
    inner: optax.GradientTransformation, friction: Friction = "abs_sigmoid"
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates of `inner` by a friction coefficient per entry.

    With the gradients :math:`G_t` that flow in, :math:`G_0 = 0`,

    .. math:: U_t = \xi(G_{t-1} - G_t) \odot \operatorname{inner}(G_t), \qquad
        \xi(d) = \frac{1}{1 + e^{-|d|}} \in [\tfrac12, 1)

    The coefficient depends on the unit of the gradient: for gradients far below 1, as most mean
    losses have, it is 1/2 everywhere, which is `inner` at half its learning rate. Put it after the
    averaging of gradients over devices and after loss scaling is undone.

    Args:
      inner: any transformation; its state sees the gradients as they are.
      friction: `"abs_sigmoid"` as above; `"sigmoid"` is signed, in (0, 1): a growing positive
        gradient brakes; `"wide_sigmoid"`, :math:`9\,\sigma(|d|/2) - 4` in [0.5, 5), accelerates
        too; `"legacy_alias"`, the first published code, is :math:`\sigma(|G_1|)` at the first
        step and 1/2 afterwards. Or a function of d, an array, to coefficients of the same shape.

    Returns:
      An element that passes `params` and extra arguments on to `inner`. Its state is
      `GradientFrictionState`, one copy of the gradient beside that of `inner`.

    Raises:
      ValueError: an unknown friction.

    Equals `inner` where gradients change by much more than 1, and half of it where they are
    constant.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> element = oxs.gradient_friction(optax.identity())
      >>> state = element.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, -100.0]), jnp.array([1.0, 100.0])):
      ...     updates, state = element.update(gradient, state)
      ...     print(*(f"{u:.3f}" for u in updates))
      0.731 -100.000
      0.500 100.000

    References:
      Dubey et al., `diffGrad <https://arxiv.org/abs/1909.11015>`_, 2020. Its first code compared
      each gradient with itself (`"legacy_alias"`); the journal numbers are of that code.
    """
    if not callable(friction) and friction not in _FRICTIONS:
        raise ValueError(
            f"friction must be a function or one of {', '.join(map(repr, _FRICTIONS))}, got "
            f"{friction!r}"
        )
    coefficient = friction if callable(friction) else _FRICTIONS[friction]
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> GradientFrictionState:
        check_real("gradient_friction", params)
        previous = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params)
        return GradientFrictionState(new_clock(), previous, inner.init(params))

    def update(
        updates: Any, state: GradientFrictionState, params: Any = None, **extra: Any
    ) -> tuple[Any, GradientFrictionState]:
        check_same_tree("gradient_friction", updates, state.previous)
        stepped, inner_state = inner.update(updates, state.inner_state, params, **extra)

        def damp(gradient: Any, previous: Any, update: Any) -> Any:
            if is_hole(gradient):
                return gradient
            difference = previous - gradient.astype(previous.dtype)
            if friction == "legacy_alias":
                difference = jnp.where(state.clock.count == 0, difference, 0)
            update = at_least_float32(update)
            return update * coefficient(difference).astype(update.dtype)

        def keep(gradient: Any, previous: Any) -> Any:
            return previous if is_hole(gradient) else gradient.astype(previous.dtype)

        damped = jax.tree.map(damp, updates, state.previous, stepped, is_leaf=is_hole)
        previous = jax.tree.map(keep, updates, state.previous, is_leaf=is_hole)
        new = GradientFrictionState(tick(state.clock), previous, inner_state)
        return as_updates(damped, updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_diffgrad(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    friction: Friction = "abs_sigmoid",
    eps_form: Literal["code", "paper"] = "code",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction under `gradient_friction`.

    .. math:: \frac{\sqrt{1-b_2^t}}{1-b_1^t} \cdot \frac{\xi_t \odot M_t}{\sqrt{V_t} + \epsilon}

    Args:
      b1, b2: decays of the mean and the mean square, in [0, 1), numbers or schedules.
      eps: added to the root, in the unit of the gradient, a number or schedule.
      friction: see `gradient_friction`.
      eps_form: `"code"` adds eps to the uncorrected root, as published code does: it weighs
        :math:`(1-b_2^t)^{-1/2}` times more; `"paper"` to the corrected one, as optax does.

    Returns:
      An element that needs no `params`. Its state is `GradientFrictionState`.

    Raises:
      ValueError: an unknown `friction` or `eps_form`, a value out of the ranges above.

    Equals `optax.scale_by_adam` for a friction of 1 and the paper's form.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> element = oxs.transforms.scale_by_diffgrad()
      >>> updates, _ = element.update(jnp.array([4.0, 0.0]), element.init(jnp.zeros(2)))
      >>> print(*(f"{u:.3f}" for u in updates))  # 1/(1 + e^-4)
      0.982 0.000
    """
    if eps_form not in ("code", "paper"):
        raise ValueError(f"eps_form must be 'code' or 'paper', got {eps_form!r}")
    if eps_form == "paper":
        return gradient_friction(debiased_adam(b1, b2, eps), friction)
    adam = optax.chain(uncorrected_adam(b1, b2, eps), bias_correction(b1, b2))
    return gradient_friction(adam, friction)
