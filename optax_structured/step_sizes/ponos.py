"""PoNoS as a whole optimizer."""

from typing import Any

import optax

from optax_structured.step_sizes.line_search import scale_by_ponos


def ponos(
    direction: optax.GradientTransformation | None = None, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """PoNoS: gradient descent, or another direction, without a learning rate to tune.

    Args:
      direction: what makes an ascent direction of gradients, such as `optax.scale_by_adam()`, for
        which the paper has `c=0.1, decrease_factor=0.9, memory=False`; None for the gradient.
      **settings: of `scale_by_ponos`.

    Returns:
      An optimizer whose update takes what that of `scale_by_ponos` does.

    Raises:
      ValueError: as `scale_by_ponos`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structured as oxs
      >>> loss = lambda w, target: jnp.mean((w - target) ** 2)
      >>> optimizer = oxs.step_sizes.ponos()
      >>> w = jnp.zeros(3)
      >>> state = optimizer.init(w)
      >>> for target in (1.0, 1.0):
      ...     value, grad = jax.value_and_grad(loss)(w, target)
      ...     updates, state = optimizer.update(
      ...         grad, state, w, value=value, grad=grad, value_fn=loss, target=target
      ...     )
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"{loss(w, 1.0):.3f}")
      0.009

    References:
      Galli, Rauhut and Schmidt, `Don't be so Monotone <https://arxiv.org/abs/2306.12747>`_, 2023.
      The code for Adam's direction does not run as released; here the decrease is measured by the
      true slope.
    """
    first = () if direction is None else (direction,)
    return optax.chain(*first, optax.scale(-1.0), scale_by_ponos(**settings))
