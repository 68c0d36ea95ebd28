"""Gradients that are not finite: the leaf takes no part in the step, and the step is counted."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.meshes.placement import agreed, like
from optax_structured.states import owners
from optax_structured.xla.traced import Traced


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped: jax.Array  # () int32: steps so far in which the gradient of some leaf was not finite
    in_a_row: jax.Array  # () int32: how many of them since the last step that was finite
    inner_state: Any  # of the inner transformation


class Guarded(optax.GradientTransformationExtraArgs):
    """What `skip_nonfinite` returns."""

    inner: optax.GradientTransformationExtraArgs


def skip_nonfinite(*inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Leaves whose gradient holds NaN or infinity take no part in the step.

    With :math:`G^l` the gradient of leaf l and :math:`S^l` all arrays of the state that belong to
    it (moments, accumulators, bases, codes),

    .. math:: (U_t^l, S_t^l) = \begin{cases} \operatorname{inner}(G_t^l, S_{t-1}^l)
        & \text{if all entries of } G_t^l \text{ are finite} \\
        (0, S_{t-1}^l) & \text{otherwise,} \end{cases}

    bit for bit. Counters and schedules, which all leaves share, go on, and other leaves get the
    step that they would have got had that gradient been finite (zero, where the inner
    transformation couples leaves, as a global norm does). There is no host sync and no branch: one
    pass over the gradients, and one scalar all-reduce per leaf that is sharded.

    Wrap a recipe or a chain of your own in it; the training jobs do. The number of such steps is in
    the state: see `diagnostics.nonfinite`.

    Args:
      *inner: a whole optimizer, or the elements of a chain. What is wrapped already is not wrapped
        twice.

    Returns:
      A transformation like `inner`, extra arguments included. Its state is `SkipNonfiniteState`,
      8 bytes more than that of `inner`.

    Equals `inner` while gradients are finite, operation by operation. Unlike
    `optax.apply_if_finite`, it skips leaves rather than whole steps, and never gives up: stop the
    run where too many are skipped in a row. `optax.MultiSteps` keeps NaN in its sum: use
    `accumulate`, or `skip_nonfinite(optax.MultiSteps(...).gradient_transformation())`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.skip_nonfinite(optax.adam(0.1))
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> gradient = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
      >>> updates, state = optimizer.update(gradient, optimizer.init(params), params)
      >>> print(updates["a"], updates["b"].round(3), state.skipped)
      [0. 0.] [-0.1 -0.1] 1
    """
    elements = [unguarded(element) for element in inner]
    chain = elements[0] if len(elements) == 1 else optax.chain(*elements)

    def init(params: Any) -> SkipNonfiniteState:
        return SkipNonfiniteState(
            jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), chain.init(params)
        )

    def update(
        updates: Any, state: SkipNonfiniteState, params: Any = None, **extra: Any
    ) -> tuple[Any, SkipNonfiniteState]:
        usable = [_all_finite(g, state.skipped) for g in jax.tree.leaves(updates)]
        updates, new = _update(chain, updates, state.inner_state, params, usable, extra)
        skips = ~jnp.all(jnp.stack(usable)) if usable else jnp.zeros((), bool)
        skipped = jnp.where(skips, optax.safe_increment(state.skipped), state.skipped)
        in_a_row = jnp.where(skips, optax.safe_increment(state.in_a_row), 0)
        return updates, SkipNonfiniteState(skipped, in_a_row, new)

    guarded = Guarded(init, update)
    guarded.inner = chain
    return guarded


def unguarded(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The inner transformation of `skip_nonfinite`, or what is not wrapped in it as it is."""
    return tx.inner if isinstance(tx, Guarded) else optax.with_extra_args_support(tx)


def _all_finite(x: jax.Array, counter: jax.Array) -> jax.Array:
    """() bool, the same on all devices that share the counter."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return jnp.ones((), bool)
    # 0 or NaN. XLA for CPUs sums floats twice as fast as it combines bools.
    return agreed(jnp.sum(x - x), counter) == 0


def _update(
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    usable: Sequence[jax.Array],
    extra: dict[str, Any],
) -> tuple[Any, Any]:
    """An update of `inner` with zeros and the old arrays where a leaf is not usable."""
    structure: Any
    states: Any
    gradients, structure = jax.tree.flatten(updates)
    old, states = jax.tree.flatten(state)
    count, names = len(gradients), _names(state)

    back: list[int] = []  # for each array of the new state, its place in the old one

    def step(inputs: list[jax.Array]) -> list[jax.Array]:
        nonlocal states
        gradient, before = structure.unflatten(inputs[:count]), states.unflatten(inputs[count:])
        moves, after = inner.update(gradient, before, params, **extra)
        arrays, states = jax.tree.flatten(after)
        ordered = dict(zip(_names(after), arrays, strict=True))
        places = {name: i for i, name in enumerate(names)}
        back.extend(places[name] for name in ordered)
        return [*structure.flatten_up_to(moves), *(ordered[name] for name in names)]

    def or_else(k: int, otherwise: jax.Array | None, new: jax.Array) -> jax.Array:
        if otherwise is None:
            return jax.lax.select(usable[k], new, jnp.zeros_like(new))
        return jax.lax.select(usable[k], new, like(otherwise.astype(new.dtype), new))

    belongs = [*range(count), *owners(inner, state, updates)]
    kept = [*[None] * count, *old]
    changes = {
        j: functools.partial(or_else, k, otherwise)
        for j, (k, otherwise) in enumerate(zip(belongs, kept, strict=True))
        if k is not None
    }
    cleaned = [or_else(k, None, g) for k, g in enumerate(gradients)]
    if not any(isinstance(x, jax.core.Tracer) for x in (*gradients, *old)):
        made = step([*cleaned, *old])
        made = [changes[j](x) if j in changes else x for j, x in enumerate(made)]
    else:
        program = Traced(step, [*gradients, *old])
        # A gradient on which nothing but its own leaf depends need not be cleaned, since all that
        # is made of it is replaced; for a matrix product that saves a copy.
        sources = enumerate(program.sources())
        read = {k for j, of in sources for k in of if k < count and k != belongs[j]}
        inputs = [cleaned[k] if k in read else g for k, g in enumerate(gradients)]
        made = program.run([*inputs, *old], changes)
    new = made[count:]
    return structure.unflatten(made[:count]), states.unflatten([new[i] for i in back])


def _names(tree: Any) -> list[tuple[str, ...]]:
    """Paths of the leaves; those of fields are the same where Flax made a mapping of a record."""
    return [
        tuple(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
        for path, _ in jax.tree.leaves_with_path(tree)
    ]
