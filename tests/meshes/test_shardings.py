"""Where optimizer state lives: right shardings for any transformation, one compilation."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import (
    all_collectives,
    beyond_flags,
    collectives_in_loops,
    shapes_of,
    steady_collectives,
)
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import host_devices
from recipes_table import assert_close, normal_tree, run, step_of
from tolerances import reordered

import optax_structured as oxs
from optax_structured.memory import state_bytes
from optax_structured.meshes.shardings import choose_sides, state_shardings

# The compressed axis of `kernel` is whole on every device, that of `stack` is sharded (FSDP).
SHAPES = {"kernel": (16, 64), "stack": (8, 16, 32), "norm": (16,)}
FSDP = {"kernel": P(None, "d"), "stack": P(None, "d", None), "norm": P("d")}
LAYERS = {**FSDP, "stack": P("d", None, None)}
LOW_RANK = oxs.rules(("norm", None), default=oxs.LowRank(8, period=2))

SLOW = pytest.mark.slow
KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
SPECS = pytest.mark.parametrize("specs", [FSDP, LAYERS], ids=["fsdp", "layers"])

TRANSFORMATIONS = {
    "adamw": lambda: optax.adamw(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "muon": lambda: optax.contrib.muon(1e-3),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "galore": lambda: oxs.galore(1e-3, LOW_RANK),
    "fira": lambda: oxs.fira(1e-3, LOW_RANK),
    "apollo": lambda: oxs.apollo(1e-3, LOW_RANK),
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


@functools.cache
def mesh(kind):
    return Mesh(np.asarray(jax.devices("cpu")[:8]), ("d",), axis_types=(kind,))


def put(tree, specs, kind):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh(kind), spec)), tree, specs
    )


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_placed(tree, shardings):
    for (path, x), s in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(s, x.ndim), f"{jax.tree_util.keystr(path)}: {x.sharding}"


@pytest.mark.slow
@KINDS
@SPECS
@pytest.mark.parametrize(
    "name",
    ["galore", *(pytest.param(x, marks=SLOW) for x in ("adamw", "adafactor", "fira", "apollo"))],
)
def test_one_compilation_and_the_same_numbers(name, specs, kind):
    """With the shardings given at init and step, nothing moves and nothing compiles twice."""
    tx = TRANSFORMATIONS[name]()
    start, grads = normal_tree("params", SHAPES), [normal_tree(i, SHAPES) for i in range(3)]
    expected, _ = run(tx, start, grads)
    params = put(start, specs, kind)
    placed = state_shardings(tx, params)
    with jax.set_mesh(mesh(kind)):
        state = jax.jit(tx.init, out_shardings=placed)(params)
        step = jax.jit(step_of(tx), out_shardings=(shardings_of(params), placed))
        for g in grads:
            params, state = step(put(g, specs, kind), state, params)
            assert_placed(state, placed)
        assert step._cache_size() == 1
    assert_close(jax.device_get(params), expected, 10 * reordered(jnp.float32))


@KINDS
@every_transformation
def test_equal_to_the_shardings_of_the_real_state(name, kind):
    """What an explicit mesh gives to a real, concrete init."""
    tx = TRANSFORMATIONS[name]()
    start = normal_tree("params", SHAPES)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        state = jax.jit(tx.init)(put(start, FSDP, AxisType.Explicit))
    found = state_shardings(tx, put(start, FSDP, kind))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert s.mesh == mesh(kind)
        same = NamedSharding(mesh(AxisType.Explicit), s.spec)
        assert x.sharding.is_equivalent_to(same, x.ndim)


@SPECS
@pytest.mark.parametrize("name", ["adamw", "galore", "fira", "apollo"])
def test_each_device_holds_its_share(name, specs):
    tx, params = TRANSFORMATIONS[name](), put(normal_tree("params", SHAPES), specs, AxisType.Auto)
    state = jax.eval_shape(tx.init, params)
    shardings = jax.tree.leaves(state_shardings(tx, params))
    local = sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(state), shardings, strict=True)
    )
    counters = 64 * len(SHAPES)  # on every device, not worth spreading
    assert local <= 1.05 * state_bytes(tx, params) / 8 + counters


def test_parameters_may_be_abstract_and_partly_without_a_place():
    struct = jax.ShapeDtypeStruct(
        (16, 4), jnp.float32, sharding=NamedSharding(mesh(AxisType.Auto), P("d"))
    )
    found = state_shardings(optax.adam(1e-3), {"kernel": struct, "bias": jnp.ones(3)})
    assert found[0].mu["kernel"].is_equivalent_to(struct.sharding, 2)
    assert found[0].mu["bias"].is_fully_replicated
    assert found[0].count.is_fully_replicated


def test_parameters_without_a_mesh_are_explained():
    with pytest.raises(ValueError, match="no parameter has a NamedSharding; place them on a mesh"):
        state_shardings(optax.adam(1e-3), {"kernel": jnp.ones(3)})
    other = Mesh(np.asarray(jax.devices("cpu")[:2]), ("d",))
    params = {
        "a": jax.device_put(jnp.ones(8), NamedSharding(mesh(AxisType.Auto), P("d"))),
        "b": jax.device_put(jnp.ones(8), NamedSharding(other, P("d"))),
    }
    with pytest.raises(ValueError, match="on 2 different meshes"):
        state_shardings(optax.adam(1e-3), params)


def test_the_chosen_side_is_the_one_that_is_whole():
    shapes = {"wide": (16, 64), "tall": (64, 16), "stack": (8, 16, 32), "norm": (16,)}
    specs = {"wide": P("d", None), "tall": P(None, "d"), "stack": P("d", None, None), "norm": P()}
    params = put(normal_tree("params", shapes), specs, AxisType.Auto)
    chosen = {item.path: item.value for item in choose_sides(LOW_RANK, params).assign(params)}
    assert chosen["norm"] is None
    sides = {path: spec.axes.side for path, spec in chosen.items() if spec}
    assert sides == {"wide": "cols", "tall": "rows", "stack": "small"}


def test_a_side_that_would_take_more_than_adam_is_not_chosen():
    """At full rank of the smaller side the larger one is at most as much, the smaller is more."""
    spec = oxs.LowRank(32, axes=oxs.Axes(side="large"))
    sharding = NamedSharding(mesh(AxisType.Auto), P("d", None))
    params = {"tall": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)}
    (chosen,) = (item.value for item in choose_sides(spec, params).assign(params))
    assert chosen == spec
    (smaller,) = (
        item.value
        for item in choose_sides(dataclasses.replace(spec, rank=8), params).assign(params)
    )
    assert smaller.axes.side == "cols"


def compiled_step(tx, params, placed=None):
    """A step, compiled from abstract parameters."""
    placed = placed or state_shardings(tx, params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        placed,
    )
    step = jax.jit(step_of(tx), out_shardings=(shardings_of(params), placed), donate_argnums=(1, 2))
    return step.lower(params, state, params).compile()


def abstract(specs):
    def struct(shape, spec):
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh(AxisType.Auto), spec)
        )

    return {name: struct(shape, specs[name]) for name, shape in SHAPES.items()}


@functools.cache
def program():
    """A GaLore step under FSDP, on the chosen sides."""
    params = abstract(FSDP)
    tx = oxs.galore(1e-3, choose_sides(LOW_RANK, params))
    return compiled_step(tx, params).as_text()


def test_a_steady_step_on_the_chosen_side_gathers_nothing_but_bases():
    moved = beyond_flags(steady_collectives(program()))
    assert all(" all-gather(" in line for line in moved)
    bases = {8 * 16, 8 * 32}  # rank 8, one layer at a time
    assert {math.prod(shape) for line in moved for shape in shapes_of(line)} <= bases


def test_whole_bases_need_no_communication_in_a_steady_step():
    params = abstract(FSDP)
    tx = oxs.galore(1e-3, choose_sides(LOW_RANK, params))
    state = state_shardings(tx, params)
    low, *rest = state.inner_state
    assert not any(s.is_fully_replicated for s in jax.tree.leaves(low.bases))
    everywhere = jax.tree.map(lambda s: NamedSharding(s.mesh, P()), low.bases)
    state = state._replace(inner_state=(low._replace(bases=everywhere), *rest))
    text = compiled_step(tx, params, state).as_text()
    assert beyond_flags(steady_collectives(text)) == []
    assert beyond_flags(all_collectives(text)) != []  # of refits


def test_a_refit_gathers_no_gradient():
    gathered = [line for line in all_collectives(program()) if " all-gather(" in line]
    gradients = {math.prod(SHAPES[name]) for name in ("kernel", "stack")}
    assert not gradients & {math.prod(shape) for line in gathered for shape in shapes_of(line)}


def test_bases_that_are_drawn_again_need_no_communication():
    params = abstract(FSDP)
    spec = oxs.LowRank(8, period=2, projector=oxs.RandomProjection())
    low_rank = choose_sides(oxs.rules(("norm", None), default=spec), params)
    compiled = compiled_step(oxs.galore(1e-3, low_rank), params)
    assert beyond_flags(steady_collectives(compiled.as_text())) == []


def test_a_stack_sharded_along_its_layers_communicates_nothing_but_flags():
    """Not in a refit either: every device decomposes its own layers."""
    params = {"stack": abstract(LAYERS)["stack"]}
    for projector in (oxs.SVD(), oxs.SubspaceIteration()):
        spec = oxs.LowRank(8, period=2, projector=projector)
        text = compiled_step(oxs.galore(1e-3, spec), params).as_text()
        sizes = [math.prod(shape) for line in all_collectives(text) for shape in shapes_of(line)]
        assert max(sizes) <= SHAPES["stack"][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_the_iteration_for_a_nuclear_norm_communicates_nothing(kind):
    """The leaf travels once, before its loop; automatic meshes are told by `jax.set_mesh`."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tx = oxs.ramda(0.1, oxs.NuclearNorm(), 0.1)
    with jax.set_mesh(mesh):
        w = jax.device_put(normal_tree("w", (64, 16)), NamedSharding(mesh, P("data")))
        text = jax.jit(tx.update).lower(w, tx.init(w), w).compile().as_text()
    assert beyond_flags(all_collectives(text)) != [] and collectives_in_loops(text) == []
    if kind == AxisType.Auto:  # untold, they move it at each turn
        text = jax.jit(tx.update).lower(w, tx.init(w), w).compile().as_text()
        assert collectives_in_loops(text) != []


SEVEN_BILLION = """
import json, math, sys, time
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType, NamedSharding
import optax_structured as oxs
from hlo import beyond_flags, steady_collectives
from optax_structured.memory import PLAIN_LEAVES, llama, state_bytes
from optax_structured.planning import place
from optax_structured.meshes.shardings import choose_sides, state_shardings

devices, stacked = int(sys.argv[1]), sys.argv[2] == "stacked"
mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,))
params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
    ),
    place(llama("7b", stacked=stacked), {"fsdp": devices}),
)
low_rank = oxs.rules((PLAIN_LEAVES, None), default=oxs.LowRank(1024))
tx = oxs.galore(1e-3, choose_sides(low_rank, params))
placed = state_shardings(tx, params)
state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(tx.init, params),
    placed,
)

def step(gradients, state, params):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

shardings = (jax.tree.map(lambda x: x.sharding, params), placed)
start = time.perf_counter()
compiled = (
    jax.jit(step, out_shardings=shardings, donate_argnums=(1, 2))
    .lower(params, state, params)
    .compile()
)
local = [
    math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
]
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "state": sum(local),
    "total": state_bytes(tx, params),
    "temp": compiled.memory_analysis().temp_size_in_bytes,
    "steady": len(beyond_flags(steady_collectives(compiled.as_text()))),
}))
"""


@SLOW
@pytest.mark.parametrize("layout", ["stacked", "layers"])
@pytest.mark.parametrize("devices", [8, 256])
def test_seven_billion_parameters_compile_from_shapes(devices, layout):
    tests = str(pathlib.Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SEVEN_BILLION, str(devices), layout],
        env={
            **os.environ,
            **host_devices(devices),
            "PYTHONPATH": os.pathsep.join([tests, *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(devices, layout, found)
    assert found["state"] <= 1.05 * found["total"] / devices
