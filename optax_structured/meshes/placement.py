"""Where arrays live: products and zeros that keep to the shardings of their operands.

On an explicit mesh the sharding of an array is part of its type, and JAX refuses to guess where the
result of an ambiguous product goes. Off explicit meshes these functions are the plain operations.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_structured.trees.precision import common_dtype

Spec = tuple[tuple[str, ...], ...]  # the mesh axes of each axis of an array


def product(
    a: jax.Array,
    b: jax.Array,
    precision: Any = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> jax.Array:
    """The matrix product over the last two axes, accumulated in float32 at least.

    Either operand may be read transposed, without an operation that says so: XLA chooses among its
    kernels for narrow types before it folds transposes into products.

    On an explicit mesh the smaller operand moves where the two disagree, and the result keeps the
    rows of the first and the columns of the second where they were.
    """
    common = common_dtype(a, b)
    dtype = common_dtype(common, jnp.float32)
    a_rows, a_inner = (-1, -2) if transpose_a else (-2, -1)
    b_inner, b_cols = (-1, -2) if transpose_b else (-2, -1)
    out = None
    if on_explicit_mesh(a, b):
        first, second = spec_of(a), spec_of(b)
        lead = a.size >= b.size
        batch, inner = (first[:-2], first[a_inner]) if lead else (second[:-2], second[b_inner])
        taken = {*sum(batch, ()), *inner}
        rows, cols = (_without(x, taken) for x in (first[a_rows], second[b_cols]))
        if lead:
            cols = _without(cols, set(rows))
        else:
            rows = _without(rows, set(cols))
        a = move(a, (*batch, inner, rows) if transpose_a else (*batch, rows, inner))
        b = move(b, (*batch, cols, inner) if transpose_b else (*batch, inner, cols))
        out = P(*(axis or None for axis in (*batch, rows, cols)))
    batch_axes = tuple(range(a.ndim - 2))
    contracted = ((a.ndim + a_inner,), (b.ndim + b_inner,))
    return jax.lax.dot_general(
        a.astype(common),
        b.astype(common),
        (contracted, (batch_axes, batch_axes)),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out,
    )


def on_explicit_mesh(*arrays: jax.Array) -> bool:
    """True if the sharding of any of these arrays is part of its type."""
    return any(_explicit(jax.typeof(x).sharding.mesh) for x in arrays)


def spec_of(x: Any) -> Spec:
    """The mesh axes of each axis of an array on an explicit mesh."""
    return _normal(jax.typeof(x).sharding.spec, jnp.ndim(x))


def move(x: jax.Array, spec: Spec) -> jax.Array:
    """`x` with this sharding, on an explicit mesh."""
    if spec_of(x) == spec:
        return x
    return jax.sharding.reshard(x, P(*(axis or None for axis in spec)))


def agreed(x: jax.Array, other: jax.Array) -> jax.Array:
    """The sum of `x`, a number, over the devices that share `other`, where a `shard_map` splits it.

    `x` as it is elsewhere, and where `other` is one for each device, too.
    """
    across = _varies_over(x) - _varies_over(other)
    return jax.lax.psum(x, tuple(across)) if across else x


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` with the placement of `other`, which has the same shape."""
    return move(x, spec_of(other)) if on_explicit_mesh(x, other) else x


def repeated(x: jax.Array, over: jax.Array) -> jax.Array:
    """`x`, which has the leading axes of `over`, repeated along the others and placed as that is.

    One operation for XLA: an axis of length 1 that is broadcast is four, and takes that much more
    time to compile.
    """
    return like(jax.lax.broadcast_in_dim(x, over.shape, tuple(range(x.ndim))), over)


def whole_matrices(x: jax.Array) -> jax.Array:
    """`x` with its last two axes on every device: what a factorisation asks for."""
    return move(x, (*spec_of(x)[:-2], (), ())) if on_explicit_mesh(x) else x


def whole(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """`x` with these of its axes on every device, where JAX knows the mesh; the others stay put."""
    if x.ndim == 0:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types):
        free = (None if axis in axes else P.UNCONSTRAINED for axis in range(x.ndim))
        return jax.lax.with_sharding_constraint(x, P(*free))
    if not on_explicit_mesh(x):
        return x
    return move(x, tuple(() if axis in axes else names for axis, names in enumerate(spec_of(x))))


def home(leaf: Any) -> tuple[Any, Spec] | None:
    """Mesh and spec of a leaf, where they are known: on explicit meshes, or of a placed array."""
    sharding = jax.typeof(leaf).sharding
    if not _explicit(sharding.mesh):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return None
    return sharding.mesh, _normal(sharding.spec, jnp.ndim(leaf))


def spread(
    shape: Sequence[int], spec: Spec, taken: Sequence[str], mesh: Any, first: int | None = None
) -> Spec:
    """`spec`, plus each mesh axis in `taken` on the axis `first`, or the largest that it divides.

    State that does not have the axis along which its leaf is sharded would be replicated there:
    it is spread over the same devices along another of its axes.
    """
    new = [tuple(axis) for axis in spec]
    for name in taken:
        size = mesh.shape[name]
        local = [
            n // math.prod(mesh.shape[a] for a in axes) for n, axes in zip(shape, new, strict=True)
        ]
        fitting = [i for i, n in enumerate(local) if n % size == 0 and n > 0]
        if fitting:
            best = max(fitting, key=lambda i: (i == first, not new[i], local[i]))
            new[best] = (*new[best], name)
    return tuple(new)


def zeros(shape: Sequence[int], dtype: Any, mesh: Any = None, spec: Spec | None = None) -> Any:
    """Zeros, placed if there is a place."""
    if mesh is None or spec is None:
        return jnp.zeros(shape, dtype)
    partition = P(*(axis or None for axis in spec))
    if _explicit(mesh):
        return jnp.zeros(shape, dtype, out_sharding=partition)
    return jnp.zeros(shape, dtype, device=NamedSharding(mesh, partition))


def put(x: jax.Array, mesh: Any, spec: Spec) -> jax.Array:
    """`x` on a mesh, explicit or automatic."""
    partition = P(*(axis or None for axis in spec))
    if _explicit(mesh):
        return jax.sharding.reshard(x, NamedSharding(mesh, partition))
    return jax.device_put(x, NamedSharding(mesh, partition))


def _normal(spec: Any, ndim: int) -> Spec:
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return (*entries, *[()] * (ndim - len(entries)))


def _without(axes: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in taken)


def _explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types if not mesh.empty else False


def _varies_over(x: jax.Array) -> frozenset[str]:
    """The mesh axes of a `shard_map` along which devices hold different values of `x`."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma  # JAX before 0.10
