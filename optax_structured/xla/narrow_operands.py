"""A transposed operand of a product of narrow types, in a layout for which there is a kernel."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def rows_first(left: jax.Array) -> jax.Array:
    """The left operand of a product, small, transposed and of a narrow type, written out.

    Backend: XLA for CPUs, which has no product of bfloat16 whose left operand is transposed where
    it is read, and would widen both. A step of `galore` with bfloat16 operands takes 0.82 to 0.90
    of `optax.contrib.galore` instead of 0.92. Over several devices it would gather what a layout
    is asked of. Can go when test_both_products_read_bfloat16 (tests/low_rank/test_identities.py)
    passes without.
    """
    if jax.device_count() > 1:
        return left
    layout = Layout(tuple(range(left.ndim)))
    return jax.lax.platform_dependent(
        left, cpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )
