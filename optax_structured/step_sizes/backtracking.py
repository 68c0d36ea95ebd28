"""Trials along one direction: shorter and shorter steps until the loss has fallen enough."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The step of the published code where no trial was accepted.
_LAST_RESORT = 1e-6


class Search(NamedTuple):
    """A search so far."""

    trials: jax.Array  # () int32: losses evaluated
    backtracks: jax.Array  # () int32: with those that were skipped without a loss
    step: jax.Array  # (): of the last trial; before the first, what it will be
    value: jax.Array  # (): the loss there
    accepted: jax.Array  # () bool: nothing is tried any more
    grad: Any  # like params, at the accepted point; None: not wanted


def backtrack(
    loss: Callable[[Any], jax.Array],
    point: Callable[[jax.Array], Any],
    enough: Callable[[jax.Array], jax.Array],
    shrink: jax.Array,
    start: Search,
    max_backtracks: int,
) -> Search:
    """Multiplies the step by `shrink` until the loss at `point(step)` is at most `enough(step)`.

    Args:
      loss: of parameters, on the current batch.
      point: the parameters after a step.
      enough: the largest loss that is accepted at a step.
      shrink: factor of a backtrack.
      start: the first step, and whether there is nothing to search.
      max_backtracks: after so many the step is 1e-6, which is always accepted.

    Returns:
      The search at its end.
    """

    def trial(search: Search) -> Search:
        exhausted = search.backtracks + 1 >= max_backtracks
        again = jnp.where(exhausted, jnp.asarray(_LAST_RESORT, shrink.dtype), search.step * shrink)
        step = jnp.where(search.trials == 0, search.step, again)
        if search.grad is None:
            reached = loss(point(step))
        else:
            reached, pullback = jax.vjp(loss, point(step))
        one = jnp.ones((), jnp.result_type(reached))
        reached = jnp.asarray(reached, search.value.dtype)
        forced = (search.trials > 0) & exhausted
        accepted = forced | (reached <= enough(step))
        kept = search.grad
        if kept is not None:
            kept = jax.lax.cond(accepted, lambda: pullback(one)[0], lambda: search.grad)
        backtracks = jnp.where((search.trials == 0) | forced, 0, 1) + search.backtracks
        return Search(search.trials + 1, backtracks, step, reached, accepted, kept)

    return jax.lax.while_loop(lambda search: ~search.accepted, trial, start)


def bound(value_fn: Callable[..., Any], extra: dict[str, Any]) -> Callable[[Any], Any]:
    """The loss as a function of parameters alone, with those of the extra arguments that it has."""
    parameters = inspect.signature(value_fn).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name: x for name, x in extra.items() if takes_all or name in parameters}
    return lambda params: value_fn(params, **known)
