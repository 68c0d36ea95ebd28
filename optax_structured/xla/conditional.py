"""A conditional that stays one under `vmap`.

Backend: all, since JAX makes a select of it. Gain: an ensemble of eight refits its subspaces when
one of them is due; with `lax.cond` at every step, which takes 335 ms where it takes 0.1 (8 SVDs).
It can go when `lax.cond` passes tests/contracts/test_vmap.py in its place.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def branch(
    pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any
) -> Any:
    """`jax.lax.cond`, but a batched predicate does not make both branches run every time.

    Under `vmap`, `lax.cond` with a batched predicate becomes a select, which evaluates both sides:
    an ensemble would refit its subspaces at every step. Here the expensive side runs only when
    some member asks for it, and members that did not keep the cheap result. Derivatives, of either
    mode, are those of `lax.cond`.

    Args:
      pred: bool, ().
      true_fun: the expensive side.
      false_fun: the cheap side; its results have the same types.
      operands: what both receive; neither may close over traced values.

    >>> import jax, jax.numpy as jnp
    >>> double = lambda p, x: branch(p, lambda x: 2 * x, lambda x: x, x)
    >>> jax.vmap(double)(jnp.array([True, False]), jnp.ones(2))
    Array([2., 1.], dtype=float32)
    """

    def plain(pred: jax.Array, operands: Any) -> Any:
        return jax.lax.cond(pred, true_fun, false_fun, *operands)

    member_by_member = jax.custom_batching.custom_vmap(plain)
    run: Any = jax.custom_jvp(member_by_member)
    run.defjvp(functools.partial(jax.jvp, plain))

    @member_by_member.def_vmap
    def batched(size: int, in_batched: Any, pred: jax.Array, operands: Any) -> Any:
        pred_batched, operands_batched = in_batched
        axes = jax.tree.map(lambda b: 0 if b else None, operands_batched)

        def member(p: jax.Array, *member_operands: Any) -> Any:
            expensive, cheap = true_fun(*member_operands), false_fun(*member_operands)
            return jax.tree.map(lambda a, b: jnp.where(p, a, b), expensive, cheap)

        def some(pred: jax.Array, *operands: Any) -> Any:
            in_axes = (0 if pred_batched else None, *axes)
            return jax.vmap(member, in_axes, axis_size=size)(pred, *operands)

        def none(pred: jax.Array, *operands: Any) -> Any:
            return jax.vmap(false_fun, axes, axis_size=size)(*operands)

        # All that is traced goes in as an operand: what a branch closes over is not batched again.
        out = branch(jnp.any(pred), some, none, pred, *operands)
        return out, jax.tree.map(lambda _: True, out)

    return run(jnp.asarray(pred), operands)
