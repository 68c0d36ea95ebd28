"""Normalised steps of geometrically decaying length, as sharp losses want them."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.trees import products
from optax_structured.trees.checks import check_nonnegative, check_share
from optax_structured.trees.precision import as_updates, at_least_float32, scalar_dtype
from optax_structured.trees.tree_checks import check_real, check_same_tree


def decaying_normalized_step(
    init: ScalarOrSchedule,
    decay: ScalarOrSchedule,
    norm: Literal["global"] | Callable[[Any], jax.Array] = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by a norm, and shortens steps by a constant factor each.

    .. math:: U_t = -\eta_0\,\rho^t\, G_t / n_t, \qquad t = 0, 1, \dots

    For losses that grow like the distance to their minimum, such as sums of absolute values, whose
    gradients do not shrink on the way. All steps together reach no farther than
    :math:`\eta_0/(1-\rho)` in units of :math:`G/n`: a run that stalls wants a larger :math:`\rho`.

    Args:
      init: :math:`\eta_0` at least 0, a number or schedule; 0.1 to 0.3 of the size of the solution.
      decay: :math:`\rho` in [0, 1], a number or schedule; 0.95 to 0.99.
      norm: of the gradient, "global" for the l2 norm of all leaves, or a function of the tree.

    Returns:
      An optimizer that needs no `params`. An update with `normalizer=`, () , divides by that
      number instead: some problems know a better one than the gradient shows. A gradient or
      normalizer of 0 gives no step. Its state is a clock.

    Raises:
      ValueError: a value out of the ranges above.

    Equals `optax.chain(optax.normalize_by_update_norm(), optax.sgd(optax.exponential_decay(init, 1,
    decay)))` for constant `init` and `decay`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> optimizer = oxs.step_sizes.decaying_normalized_step(init=1.0, decay=0.5)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(jnp.array([3.0, 4.0]), state)
      ...     print(updates)
      [-0.6 -0.8]
      [-0.3 -0.4]

    References:
      Ma and Fattahi, `Global Convergence of Sub-gradient Method for Robust Matrix Recovery
      <https://arxiv.org/abs/2202.08788>`_, JMLR 2023, where the normalizer is the norm of the
      averaged signs of residuals.
    """
    check_nonnegative("init", init)
    check_share("decay", decay)
    if norm != "global" and not callable(norm):
        raise ValueError(f"norm must be 'global' or a function of the gradients, got {norm!r}")
    size: Callable[[Any], Any] = norm if callable(norm) else products.norm

    def start(params: Any) -> Clock:
        check_real("decaying_normalized_step", params)
        return new_clock()

    def update(
        updates: Any, state: Clock, params: Any = None, *, normalizer: Any = None, **_: Any
    ) -> tuple[Any, Clock]:
        if params is not None:
            check_same_tree("decaying_normalized_step", updates, params, whose="the parameters")
        wide = jax.tree.map(at_least_float32, updates)
        dtype = scalar_dtype(wide)
        by = jnp.asarray(size(wide) if normalizer is None else normalizer, dtype)
        rate = jnp.asarray(now(init, state), dtype)
        rate = rate * jnp.asarray(now(decay, state), dtype) ** state.count.astype(dtype)
        factor = jnp.where(by > 0, -rate / jnp.where(by > 0, by, 1), 0)
        scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), wide)
        return as_updates(scaled, updates, params), tick(state)

    return optax.GradientTransformationExtraArgs(start, update)
