"""A part of a program that is compiled as a program of its own."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

SMALL = 2**13  # entries of a leaf; of larger ones there are not enough to take long to compile


def apart(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)`, of which XLA makes a call that it does not inline.

    Backend: CPU, one device, under `jit`. There XLA compares what each kernel of a program reads
    and writes with what every other one does. The kernels of a call are compared with each other,
    and what they share counts once outside. Gain: 2000 leaves of 64 x 64 compile in 46 s instead of
    58 with `apollo`, in 47 instead of 65 in 8-bit Adam. It can go when
    `tests/benchmarks/many_leaves.py` grows as slowly from 500 to 2000 leaves without.

    Args:
      function: of trees of arrays; what its results are computed from may be closed over, too.
      operands: all of them are made before the call begins, and no kernel in it computes them.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands))
    if not traced or jax.device_count() > 1 or jax.default_backend() != "cpu":
        return function(*operands)

    @jax.jit
    def program(*operands: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # the calls inside are
            return function(*operands)

    with set_xla_metadata(inlineable="false"):
        return program(*operands)
