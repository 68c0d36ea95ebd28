"""The matrices of a stack one after the other, where a compiler would gather or hold all at once.

Backend: all with several devices. A stack of bases that is spread over them is gathered for a
product with the gradients: in a loop one matrix at a time, else the whole stack. Gain, a GaLore
step of LLaMA-7B for 256 chips: see docs/pods.md. It can go when the compiler splits such products
over a batch axis itself.
"""

from collections.abc import Callable
from typing import Any

import jax


def one_by_one(f: Callable[..., Any], axes: int, *stacks: Any) -> Any:
    """`f` of trees of arrays without their first axes, for each place along these axes.

    >>> import jax.numpy as jnp
    >>> one_by_one(jnp.dot, 1, jnp.ones((3, 2)), jnp.ones((3, 2)))
    Array([2., 2., 2.], dtype=float32)
    """
    if not axes:
        return f(*stacks)
    return jax.lax.map(lambda each: one_by_one(f, axes - 1, *each), stacks)
