"""Where the state of an optimizer lives on a mesh, and which side keeps low-rank steps local."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_structured.trees import AxisLike, Rules, named_leaves, resolve


def state_shardings(tx: Any, params: Any) -> Any:
    """The sharding of every leaf of `tx.init(params)`, for any optax transformation.

    An explicit mesh makes shardings part of the types, so an abstract `init` on one tells where
    each array of the state belongs: moments where their parameters are, low-rank moments and bases
    spread over the same devices, counters everywhere. Nothing is allocated.

    `jax.jit(tx.init)` on an automatic mesh would replicate what starts as zeros. Give the result
    as `out_shardings` to `init` and to the step, which then compiles once.

    Args:
      tx: any optax transformation.
      params: arrays or `jax.ShapeDtypeStruct`, with `NamedSharding` on one mesh: automatic or
        explicit, of devices or abstract. Leaves without one count as replicated.

    Returns:
      A tree with the structure of the state, of `NamedSharding` on the mesh of the parameters.

    Raises:
      ValueError: no parameter has a `NamedSharding`, or they are on different meshes.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
      >>> params = {"kernel": jax.device_put(jnp.zeros((8, 4)), rows)}
      >>> adam = optax.adam(1e-3)
      >>> placed = state_shardings(adam, params)
      >>> placed[0].mu["kernel"] == rows
      True
      >>> state = jax.jit(adam.init, out_shardings=placed)(params)
    """
    mesh = _mesh_of(params)
    explicit = AbstractMesh(
        tuple(mesh.shape.values()),
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )

    def twin(leaf: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(explicit, _spec_of(leaf))
        return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=place)

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(twin, params))
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec_of(leaf)), state)


def choose_sides(low_rank: Any, params: Any) -> Rules:
    """The same low-rank structure, compressing the axis of each leaf that is not sharded.

    Projection contracts the compressed axis. Where that axis is whole on every device, the steady
    step of a low-rank optimizer needs no communication. Where neither matrix axis is sharded, or
    both are, the side stays as it was.

    Stacks of matrices that are sharded, as of scanned layers, are marked `one_by_one`: a device
    then holds one whole basis of a stack at a time.

    Args:
      low_rank: a `LowRank`, or `rules` of them.
      params: arrays or `jax.ShapeDtypeStruct` with `NamedSharding`.

    Returns:
      `rules` that name the leaves of `params` one by one, for `galore(1e-2, rules)` and the like.

    Raises:
      ValueError: rules that match nothing, or a leaf that cannot take an explicit spec.

    Example: see `state_shardings` for how parameters are placed.
    """
    paths: dict[Any, list[str]] = {}
    for (path, leaf), spec in zip(named_leaves(params), resolve(low_rank, params), strict=True):
        paths.setdefault(_with_local_side(spec, leaf), []).append(path)
    # One pattern a spec, not one per leaf: a pattern is searched in the path of every leaf.
    pairs = ((f"^(?:{'|'.join(map(re.escape, names))})$", spec) for spec, names in paths.items())
    return Rules(tuple(pairs), default=None)


def _with_local_side(spec: Any, leaf: Any) -> Any:
    if spec is None:
        return None
    axes = spec.axes
    batch = tuple(axes.split(leaf.shape)[0])
    rows, cols, stack = (_is_sharded(leaf, x) for x in (axes.rows, axes.cols, batch))
    if batch and not stack and (rows or cols):
        spec = dataclasses.replace(spec, one_by_one=True)
    if rows == cols:
        return spec
    side = "cols" if rows else "rows"
    local = dataclasses.replace(spec, axes=dataclasses.replace(axes, side=side))
    try:
        local.check(leaf.shape)
    except ValueError:  # the smaller side may take more than plain Adam where the larger does not
        return spec
    return local


def _is_sharded(leaf: Any, axes: AxisLike) -> bool:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return False
    local = sharding.shard_shape(leaf.shape)
    axes = axes if isinstance(axes, tuple) else (axes,)
    return any(local[axis] < leaf.shape[axis] for axis in axes)


def _mesh_of(params: Any) -> Mesh | AbstractMesh:
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding)}
    if not meshes:
        raise ValueError(
            "state_shardings: no parameter has a NamedSharding; place them on a mesh with "
            "jax.device_put(params, shardings), or give jax.ShapeDtypeStruct with sharding=..."
        )
    if len(meshes) > 1:
        raise ValueError(
            f"state_shardings: the parameters are on {len(meshes)} different meshes: "
            f"{', '.join(map(str, meshes))}; place them on one"
        )
    return meshes.pop()


def _spec_of(leaf: Any) -> P:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else P()
