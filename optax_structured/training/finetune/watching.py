"""What watches gradients beside an optimizer: perturbations, and the allocator of SNELLA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.adapters import (
    AllocatorState,
    GGPOState,
    MGPOState,
    Perturbation,
    SparsityAllocator,
)


class WatchState(NamedTuple):
    """State of `watching`."""

    step: jax.Array  # () int32: steps since init
    watched: Any  # of the perturbation or the allocator


def watching(
    watcher: Perturbation | SparsityAllocator, frozen: Any
) -> optax.GradientTransformation:
    """Shows each gradient to a perturbation or an allocator, and passes it through unchanged.

    An allocator sees the adapter before the update, one step older than its authors' does.
    """

    def init(adapter: Any) -> WatchState:
        start = (frozen, adapter) if isinstance(watcher, Perturbation) else (adapter,)
        return WatchState(jnp.zeros((), jnp.int32), watcher.init(*start))

    def update(gradient: Any, state: WatchState, adapter: Any = None) -> tuple[Any, WatchState]:
        seen = watcher.observe(state.watched, adapter, gradient)
        if isinstance(watcher, SparsityAllocator):
            seen = watcher.allocate(seen, state.step)
        return gradient, WatchState(state.step + 1, seen)

    return optax.GradientTransformation(init, update)


def watched(opt_state: Any) -> Any:
    """The state of the watcher in that of an optimizer; None where there is none."""
    kinds = AllocatorState | GGPOState | MGPOState
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return next((x for x in leaves if isinstance(x, kinds)), None)
