"""The exact group solve as one kernel: groups stay in fast memory until they are solved."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import on_explicit_mesh
from optax_structured.proximal.solvers import Exact
from optax_structured.proximal.subproblem import Subproblem
from optax_structured.regularizers.base import Regularizer
from optax_structured.regularizers.group import GroupLasso
from optax_structured.regularizers.secular import solve_group

_BLOCK = 2**17  # entries of a block, of which four arrays are in fast memory, twice
_LARGEST = 2**18
_TILE = (8, 128)  # of float32 on a TPU: other blocks must span their axis


@dataclasses.dataclass(frozen=True)
class FusedExact:
    r"""`Exact`, on TPUs in one Pallas kernel per leaf for `GroupLasso` in a diagonal metric.

    XLA reads the linear term and the metric once for each of eight reductions; the kernel reads
    V, P and :math:`W_0` once and writes the minimiser over P. It is for float32 leaves whose groups
    are runs of entries (the axes inside are the last ones), up to 32768 of them, or columns (the
    first ones), up to 2048. Everything else, and every other platform, is `Exact`, whose result it
    has up to rounding. It may not be differentiated.

    Compiled for TPUs and tested in Pallas' interpreter, but never run on a device: measure before
    you rely on it. Sharded leaves need a `jax.shard_map` around the update, as JAX will say.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> groups, solver = oxs.GroupLasso(group_axis=-2), oxs.proximal.FusedExact()
      >>> optimizer = oxs.ramda(0.1, groups, 0.5, momentum=0.0, solver=solver)
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> state = optimizer.init(params)
      >>> grads = {"kernel": jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])}
      >>> updates, state = optimizer.update(grads, state, params)
    """

    def solve(self, regularizer: Regularizer, sub: Subproblem, warm: jax.Array) -> jax.Array:
        """The minimiser; see `Solver.solve`."""
        v, p, c = sub.direction, sub.metric, sub.centre
        if not _fits(regularizer, v, p, c):
            return Exact().solve(regularizer, sub, warm)
        assert isinstance(regularizer, GroupLasso)

        def exact(v: jax.Array, p: jax.Array, c: jax.Array, _: jax.Array) -> jax.Array:
            return Exact().solve(regularizer, Subproblem(v, p, c, sub.weight), warm)

        threshold = sub.weight * regularizer.group_weight(v.shape)
        inside = regularizer.coupled_axes(v.ndim)
        kernel = functools.partial(solve_blocks, inside=inside)
        return jax.lax.platform_dependent(v, p, c, threshold, tpu=kernel, default=exact)


def _fits(regularizer: Regularizer, *arrays: jax.Array) -> bool:
    v = arrays[0]
    if type(regularizer) is not GroupLasso or on_explicit_mesh(*arrays) or not v.size:
        return False
    inside = regularizer.coupled_axes(v.ndim)
    in_rows = _are_rows(inside, v.ndim)
    whole = in_rows or inside == tuple(range(len(inside)))
    small = math.prod(v.shape[i] for i in inside) * _TILE[0 if in_rows else 1] <= _LARGEST
    return whole and small and all(x.shape == v.shape and x.dtype == jnp.float32 for x in arrays)


def _are_rows(inside: tuple[int, ...], ndim: int) -> bool:
    return inside == tuple(range(ndim - len(inside), ndim))


def solve_blocks(
    v: jax.Array,
    p: jax.Array,
    c: jax.Array,
    threshold: jax.Array,
    *,
    inside: tuple[int, ...],
    interpret: bool = False,
) -> jax.Array:
    """`solve_group` of b = P W0 - V and P, block of groups by block of groups."""
    # Imported where it is used: half of the time that the package takes to import.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    leaf, in_rows = v.shape, _are_rows(inside, v.ndim)
    size = math.prod(leaf[i] for i in inside)
    groups, tile = v.size // size, _TILE[0 if in_rows else 1]
    many = min(groups, max(_BLOCK // size // tile, 1) * tile)
    if in_rows:
        shape, block = (groups, size), pl.BlockSpec((many, size), lambda i: (i, 0))
    else:
        shape, block = (size, groups), pl.BlockSpec((size, many), lambda i: (0, i))

    def kernel(threshold: Any, v: Any, p: Any, c: Any, w: Any) -> None:
        metric = p[...]
        b = metric * c[...] - v[...]
        w[...] = solve_group(b, metric, threshold[0], (1,) if in_rows else (0,))

    v, p, c = (x.reshape(shape) for x in (v, p, c))
    w = pl.pallas_call(
        kernel,
        out_shape=jax.eval_shape(lambda v: v, v),  # inside shard_map, with the axes it varies over
        grid=(pl.cdiv(groups, many),),
        in_specs=[pl.BlockSpec(memory_space=tpu.SMEM), block, block, block],
        out_specs=block,
        input_output_aliases={2: 0},  # over P
        interpret=interpret,
    )(threshold.reshape(1), v, p, c)
    return w.reshape(leaf)
