"""Finishing one leaf before the next begins, where the compiler would not see to it."""

from collections.abc import Callable
from typing import Any

import jax

from optax_structured.meshes.placement import on_explicit_mesh
from optax_structured.quantization.codec import is_encoded


def settled(encode: Callable[[Any], Any], fresh: Any, old: Any) -> Any:
    """`encode(fresh)`, as one operation: what reads a part of the codes waits for all of them.

    XLA for CPUs runs independent operations in any order, each with memory of its own, and would
    rather compute a code twice than wait for it. A branch it can neither look into nor decide is
    a unit; accelerators, which run one operation after the other, do without.

    Args:
      encode: the codes of a tree of arrays.
      fresh: the arrays.
      old: what `encode` gave last time.
    """
    scales = [x[1] for x in jax.tree.leaves(old, is_leaf=is_encoded) if is_encoded(x) and x[1].size]
    if not scales or on_explicit_mesh(*scales):
        return encode(fresh)

    def unit(fresh: Any, old: Any, scale: jax.Array) -> Any:
        always = ~(scale[(0,) * scale.ndim] < 0)  # no scale is negative, which XLA does not know
        return jax.lax.cond(always, lambda fresh, _: encode(fresh), lambda _, old: old, fresh, old)

    return jax.lax.platform_dependent(
        fresh, old, scales[0], cpu=unit, default=lambda fresh, *_: encode(fresh)
    )
