"""One step of an optimizer for the mean of several gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured.states.roles import Pending
from optax_structured.trees.precision import as_stored, as_updates, at_least_float32
from optax_structured.xla.conditional import branch


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    steps: jax.Array  # () int32: steps of the inner optimizer so far
    waiting: jax.Array  # () int32: gradients since its last step
    total: Pending[Any]  # like params, float32 or wider: their sum, zero after a step
    inner: Any  # state of the inner optimizer, changes with its steps only


def accumulate(
    inner: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step of `inner` with the mean of `every` gradients, and none in between.

    .. math:: U_t = \operatorname{inner}\Big(\frac1k \sum_{i=t-k+1}^{t} G_i\Big)
        \text{ if } k \mid t, \qquad U_t = 0 \text{ otherwise}

    The inner update, with all its decompositions, runs when it is due and not otherwise, under
    `vmap` too; `optax.MultiSteps` computes it for each gradient and throws it away. As the inner
    transformation of `low_rank_projection` it accumulates in the low-rank space, and the sum takes
    rank times length numbers per leaf: the basis has to stay while it fills, so `period` is then a
    multiple of `every`, counted in gradients.

    Args:
      inner: any optimizer, element or chain.
      every: k, gradients per step, a Python int. A run may go on with another: gradients that wait
        by then are all part of the next mean.

    Returns:
      An optimizer that passes `params` and extra arguments of the last of the gradients on, and
      returns updates of zero in between, in the precision of gradients or weights, whichever is
      wider. Its state is `AccumulateState`.

    Raises:
      ValueError: `every` is not a whole number of at least 1.

    Equals `inner` for `every=1`. A gradient that is not finite reaches `inner` in the mean, so a
    recipe skips the whole mean; the next sum starts from zero.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.accumulate(optax.sgd(1.0), every=2)
      >>> state = optimizer.init(jnp.zeros(1))
      >>> for gradient in (1.0, 3.0):
      ...     updates, state = optimizer.update(jnp.array([gradient]), state)
      ...     print(updates)
      [0.]
      [-2.]
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> AccumulateState:
        return AccumulateState(
            steps=jnp.zeros((), jnp.int32),
            waiting=jnp.zeros((), jnp.int32),
            total=jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(p)), params),
            # Of types that can be kept: weak ones, which Python numbers leave, cannot.
            inner=jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), inner.init(params)),
        )

    def update(
        updates: Any, state: AccumulateState, params: Any = None, **extra: Any
    ) -> tuple[Any, AccumulateState]:
        # Arrays must be operands of the branch; functions and mere shapes cannot be.
        traced, static = _arrays({"params": params, **extra})

        def step(count: jax.Array, total: Any, state: Any, traced: Any) -> Any:
            mean = jax.tree.map(lambda s: s / count.astype(s.dtype), total)
            rest = {**traced, **static}
            stepped, new = inner.update(cast(mean), state, rest.pop("params"), **rest)
            return cast(stepped), jax.tree.map(jnp.zeros_like, total), as_stored(new, state)

        def wait(count: jax.Array, total: Any, state: Any, *_: Any) -> Any:
            return cast(jax.tree.map(jnp.zeros_like, total)), total, state

        def cast(tree: Any) -> Any:
            return as_updates(tree, updates, params)

        total = jax.tree.map(lambda s, g: s + jnp.asarray(g, s.dtype), state.total, updates)
        count = state.waiting + 1
        due = count >= every  # more are waiting where a run goes on with a smaller number
        operands = count, total, state.inner, traced
        step, closed_over = jax.closure_convert(step, *operands)  # a traced learning rate
        out, total, inner_state = branch(due, step, wait, *operands, *closed_over)
        return out, AccumulateState(
            steps=jnp.where(due, optax.safe_increment(state.steps), state.steps),
            waiting=jnp.where(due, 0, count),
            total=total,
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _arrays(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that hold arrays only, and the others."""

    def is_array(x: Any) -> bool:
        return isinstance(x, jax.Array | np.ndarray | np.generic | float | int)

    traced = {name: x for name, x in arguments.items() if all(map(is_array, jax.tree.leaves(x)))}
    return traced, {name: x for name, x in arguments.items() if name not in traced}
