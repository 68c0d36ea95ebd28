"""Gradients that are not finite: the step is skipped, and counted."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.meshes.placement import agreed, like
from optax_structured.states.errors import ChangedSetting
from optax_structured.trees.tree_checks import AnotherTree, check_same_tree
from optax_structured.xla.apart import SMALL, apart
from optax_structured.xla.one_number import one_number
from optax_structured.xla.traced import Traced


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped: jax.Array  # () int32: steps so far in which some gradient was not finite
    in_a_row: jax.Array  # () int32: how many of them since the last step that was finite
    inner_state: Any  # of the inner transformation


class Guarded(optax.GradientTransformationExtraArgs):
    """What `skip_nonfinite` returns."""

    inner: optax.GradientTransformationExtraArgs


def skip_nonfinite(*inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Skips steps whose gradients hold NaN or infinity, and counts them.

    With G all gradients of a step, U its updates and S the state of `inner`,

    .. math:: (U_t, S_t) = \begin{cases} \operatorname{inner}(G_t, S_{t-1})
        & \text{if all entries of } G_t \text{ are finite} \\
        (0, S_{t-1}) & \text{otherwise,} \end{cases}

    bit for bit: moments, sums, bases, codes, counters and random keys stay as they were, as if the
    step had not been. There is no host sync and no branch: one pass over the gradients, and a
    selection where each array of the state is written.

    All recipes end with it, and so do `quantized` and `restart_at`. Wrap a chain of
    your own in it. The number of such steps is in the state: see `diagnostics.nonfinite`.

    Args:
      *inner: a whole optimizer, or the elements of a chain. What is wrapped already is not wrapped
        twice.

    Returns:
      A transformation like `inner`, extra arguments included. Its state is `SkipNonfiniteState`,
      8 bytes more than that of `inner`.

    Equals `inner` while gradients are finite, operation by operation. Unlike
    `optax.apply_if_finite`, it looks at gradients rather than updates, has no branch, and never
    gives up: stop the run where too many are skipped in a row. `optax.MultiSteps` keeps NaN in its
    sum: use `accumulate`, or `skip_nonfinite(optax.MultiSteps(...).gradient_transformation())`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.skip_nonfinite(optax.adam(0.1))
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> gradient = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
      >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
      >>> print(updates["a"], updates["b"], state.skipped)
      [0. 0.] [0. 0.] 1
    """
    chain = _chain([unguarded(element) for element in inner])

    def init(params: Any) -> SkipNonfiniteState:
        return SkipNonfiniteState(
            jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), chain.init(params)
        )

    def update(
        updates: Any, state: SkipNonfiniteState, params: Any = None, **extra: Any
    ) -> tuple[Any, SkipNonfiniteState]:
        usable = _all_finite(updates, state.skipped)
        try:
            updates, new = step_if(usable, chain, updates, state.inner_state, params, **extra)
        except (AnotherTree, ChangedSetting):  # which say what differs
            raise
        except (KeyError, TypeError, ValueError):
            if params is not None:
                check_same_tree("the optimizer", updates, params, whose="the parameters")
                _check_same_state(state.inner_state, chain, params)
            raise
        skipped = jnp.where(usable, state.skipped, optax.safe_increment(state.skipped))
        in_a_row = jnp.where(usable, 0, optax.safe_increment(state.in_a_row))
        updates = jax.tree.map(functools.partial(new_if, usable), updates)
        return updates, SkipNonfiniteState(skipped, in_a_row, new)

    guarded = Guarded(init, update)
    guarded.inner = chain
    return guarded


def unguarded(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The inner transformation of `skip_nonfinite`, or what is not wrapped in it as it is."""
    return tx.inner if isinstance(tx, Guarded) else optax.with_extra_args_support(tx)


class Skipping(optax.GradientTransformationExtraArgs):
    """A transformation whose update takes `usable` and keeps its state if it is not.

    None: it is usable. What updates are where it is not does not matter.
    """


def _chain(
    elements: Sequence[optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` that keeps the state of one element after the other, if one does by itself."""
    if len(elements) == 1:
        return elements[0]
    if not any(isinstance(element, Skipping) for element in elements):
        return optax.chain(*elements)

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(element.init(params) for element in elements)

    def update(
        updates: Any,
        state: tuple[Any, ...],
        params: Any = None,
        *,
        usable: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, tuple[Any, ...]]:
        kept = []
        for element, old in zip(elements, state, strict=True):
            updates, new = step_if(usable, element, updates, old, params, **extra)
            kept.append(new)
        return updates, tuple(kept)

    return Skipping(init, update)


def step_if(
    usable: jax.Array | None,
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    **extra: Any,
) -> tuple[Any, Any]:
    """A step of `inner`, whose state stays where gradients are not usable."""
    if isinstance(inner, Skipping):
        return inner.update(updates, state, params, usable=usable, **extra)
    if usable is None or not jax.tree.leaves(state):
        return inner.update(updates, state, params, **extra)

    def step(updates: Any, state: Any) -> tuple[Any, Any]:
        return inner.update(updates, state, params, **extra)

    def changes(moves: Any, new: Any) -> list[Any]:
        old = dict(zip(_names(state), jax.tree.leaves(state), strict=True))
        kept = [functools.partial(new_if, usable, old=old[name]) for name in _names(new)]
        return [*(None for _ in jax.tree.leaves(moves)), *kept]

    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((updates, state))):
        traced = Traced(step, updates, state)
        return traced.run(updates, state, changes=changes(*traced.shapes))
    made: Any
    structure: Any
    made, structure = jax.tree.flatten(step(updates, state))
    pairs = zip(changes(*structure.unflatten(made)), made, strict=True)
    return structure.unflatten(change(x) if change else x for change, x in pairs)


def new_if(usable: jax.Array | None, new: Any, old: Any = None) -> Any:
    """`new` where gradients are usable, else `old`, or zero."""
    if usable is None:
        return new
    new = jnp.asarray(new)
    old = jnp.zeros_like(new) if old is None else like(jnp.asarray(old).astype(new.dtype), new)
    return jax.lax.select(usable, new, old)


def _check_same_state(state: Any, tx: optax.GradientTransformation, params: Any) -> None:
    """Raises ValueError where `tx` makes another state for these parameters."""
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    if shapes(jax.eval_shape(tx.init, params)) != shapes(state):
        raise ValueError(
            "the state belongs to another transformation or to other parameters: call init with "
            "the parameters that are updated; leave leaves out with optax.masked or optax.partition"
        )


def _all_finite(tree: Any, counter: jax.Array) -> jax.Array:
    """() bool, the same on all devices that share the counter."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    def total(leaves: list[Any]) -> jax.Array:
        # 0 or NaN. XLA for CPUs sums floats twice as fast as it combines bools.
        return sum((jnp.sum(x - x).real.astype(jnp.float32) for x in leaves), jnp.zeros(()))

    large = total([x for x in leaves if jnp.size(x) > SMALL])

    def all_finite(small: list[Any]) -> jax.Array:
        return one_number(agreed(large + total(small), counter)) == 0

    return apart(all_finite, [x for x in leaves if jnp.size(x) <= SMALL])


def _names(tree: Any) -> list[tuple[str, ...]]:
    """Paths of the leaves; those of fields are the same where Flax made a mapping of a record."""
    return [
        tuple(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
        for path, _ in jax.tree.leaves_with_path(tree)
    ]
