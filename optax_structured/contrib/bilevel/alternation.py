"""Alternating descent of two players, of first order or through one step of the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from optax_structured.contrib.bilevel.base import BilevelSolver
from optax_structured.states.clock import Clock, ScalarOrSchedule, new_clock, now, tick
from optax_structured.trees.checks import check_nonnegative


class AlternationState(NamedTuple):
    """State of `alternation`."""

    clock: Clock  # steps since init, for schedules
    upper: Any  # state of the optimizer of x
    lower: Any  # state of the optimizer of y


def alternation(
    upper: Callable[[Any, Any, Any], jax.Array],
    lower: Callable[[Any, Any, Any], jax.Array],
    upper_optimizer: optax.GradientTransformation,
    lower_optimizer: optax.GradientTransformation,
    *,
    unroll: ScalarOrSchedule = 0.0,
) -> BilevelSolver:
    r"""Descends in x on one batch, then in y on another.

    .. math:: x \leftarrow x - \text{step of } \nabla_x f\big(x,\; y - \xi \nabla_y g(x, y)\big),
        \qquad y \leftarrow y - \text{step of } \nabla_y g(x, y)

    Architectures against weights, or hyperparameters against parameters: f is the loss on a batch
    of validation data, g that on a batch of training data. With :math:`\xi = 0` it is of first
    order, and x has no influence on f but the direct one; otherwise it is differentiated through
    one gradient step of y, exactly.

    Args:
      upper: `upper(x, y, batch)`, () : f.
      lower: `lower(x, y, batch)`, () : g.
      upper_optimizer: of x, any optax optimizer; published for architectures:
        `optax.adam(3e-4, b1=0.5)` with weight decay 1e-3.
      lower_optimizer: of y, any optax optimizer.
      unroll: :math:`\xi \ge 0`, a number or schedule; the learning rate of y. 0, as a number,
        costs one gradient less.

    Returns:
      A `BilevelSolver`: `init(x, y)` and `update(x, y, state, upper_batch, lower_batch)`.

    Raises:
      ValueError: a negative `unroll`.

    Equals, for `unroll=0` and functions of one variable each, the two optimizers by themselves.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> solver = alternation(
      ...     lambda x, y, target: (y - target) ** 2,
      ...     lambda x, y, _: (y - x) ** 2,
      ...     optax.sgd(1.0), optax.sgd(0.25), unroll=0.25)
      >>> x = y = jnp.zeros(())
      >>> state = solver.init(x, y)
      >>> for _ in range(50):
      ...     x, y, state = solver.update(x, y, state, 3.0, None)
      >>> print(f"{x:.2f} {y:.2f}")
      3.00 3.00

    References:
      Liu, Simonyan and Yang, `DARTS <https://arxiv.org/abs/1806.09055>`_, 2019. Its code takes the
      second derivatives by finite differences; here they are exact, at the same cost.
    """
    check_nonnegative("unroll", unroll)
    first_order = not callable(unroll) and not isinstance(unroll, jax.core.Tracer) and unroll == 0

    def init(x: Any, y: Any) -> AlternationState:
        return AlternationState(new_clock(), upper_optimizer.init(x), lower_optimizer.init(y))

    def update(
        x: Any, y: Any, state: AlternationState, upper_batch: Any = None, lower_batch: Any = None
    ) -> tuple[Any, Any, AlternationState]:
        def outer(x: Any) -> jax.Array:
            if first_order:
                return upper(x, y, upper_batch)
            rate = now(unroll, state.clock)
            slope = jax.grad(lower, argnums=1)(x, y, lower_batch)
            ahead = jax.tree.map(lambda y, g: y - (rate * g).astype(y.dtype), y, slope)
            return upper(x, ahead, upper_batch)

        updates, upper_state = upper_optimizer.update(jax.grad(outer)(x), state.upper, x)
        x = optax.apply_updates(x, updates)
        slope = jax.grad(lower, argnums=1)(x, y, lower_batch)
        updates, lower_state = lower_optimizer.update(slope, state.lower, y)
        y = optax.apply_updates(y, updates)
        return x, y, AlternationState(tick(state.clock), upper_state, lower_state)

    return BilevelSolver(init, update)
