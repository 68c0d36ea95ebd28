"""Stored state on meshes: blocks stay on their device, and runs move from mesh to mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hlo import all_collectives, beyond_flags
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from recipes_table import assert_close, assert_equal, normal_tree, step_of
from tolerances import FLIPPED_CODES, reordered

import optax_structured as oxs

SHAPES = {"embed": (16, 64), "stack": (8, 4, 32), "bias": (64,)}
LEADING = {"embed": P("data", None), "stack": P("data", None, None), "bias": P("data")}
BITS = {"8": oxs.Dynamic(8, 8), "4": oxs.Dynamic(4, 8)}
both_bits = pytest.mark.parametrize("codec", BITS.values(), ids=BITS)
both_kinds = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


@functools.cache
def mesh(kind, data=8, model=1):
    devices = np.asarray(jax.devices("cpu")[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def place(tree, where, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(where, s)), tree, specs)


def optimizer(codec):
    return oxs.quantized(optax.adam(1e-2), codec, min_size=0)


def assert_same_run(got, expected):
    """Codes too, but for entries that lie between two of them to the last bit."""
    got, expected = (jax.tree.map(np.asarray, x) for x in (got, expected))
    assert_close(got[0], expected[0], reordered(jnp.float32))
    for a, b in zip(*map(jax.tree.leaves, (got[1], expected[1])), strict=True):
        assert a.dtype == b.dtype
        assert a.dtype != np.uint8 or np.mean(a != b) <= FLIPPED_CODES


@pytest.mark.slow
@both_kinds
@both_bits
def test_aligned_blocks_are_those_of_one_device(codec, kind):
    tx = optimizer(codec)
    start, grads = normal_tree("params", SHAPES), [normal_tree(i, SHAPES) for i in range(3)]
    expected, plain = start, tx.init(start)
    step = jax.jit(step_of(tx))
    for g in grads:
        expected, plain = step(g, plain, expected)
    with jax.set_mesh(mesh(kind)):
        current = place(start, mesh(kind), LEADING)
        state = jax.jit(tx.init)(current)
        for g in grads:
            current, state = step(place(g, mesh(kind), LEADING), state, current)
    assert_same_run((current, state), (expected, plain))


@pytest.mark.slow
@both_kinds
@both_bits
def test_no_block_is_communicated(codec, kind):
    tx = optimizer(codec)
    with jax.set_mesh(mesh(kind)):
        start = place(normal_tree("params", SHAPES), mesh(kind), LEADING)
        grads = place(normal_tree(0, SHAPES), mesh(kind), LEADING)
        state = place_state(tx, start, kind)
        step = jax.jit(step_of(tx)).lower(grads, state, start).compile()
        assert beyond_flags(all_collectives(step.as_text())) == []
        _, state = step(grads, state, start)
        for leaf in jax.tree.leaves(state):
            assert leaf.ndim == 0 or leaf.sharding.shard_shape(leaf.shape)[0] < leaf.shape[0]


def place_state(tx, start, kind):
    """As the parameters lie; an automatic mesh would leave zeros on every device."""
    if kind == AxisType.Explicit:
        return jax.jit(tx.init)(start)
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh(kind), P(*("data",) * (x.ndim > 0)))),
        tx.init(start),
    )


@pytest.mark.slow
def test_rows_may_be_sharded_where_no_block_crosses():
    spec = {"embed": P(None, "data")}
    with jax.set_mesh(mesh(AxisType.Explicit, 8)):
        start = place(normal_tree("params", {"embed": (16, 64)}), mesh(AxisType.Explicit), spec)
        tx = optimizer(oxs.Dynamic(8, 8))
        state = tx.init(start)
        assert state.inner_state.inner[0].mu["embed"].absmax.sharding.spec == P(None, "data")
        text = jax.jit(step_of(tx)).lower(start, state, start).compile().as_text()
        assert beyond_flags(all_collectives(text)) == []


@pytest.mark.parametrize(
    ("shape", "spec", "block", "stored"),
    [
        ((16, 64), P(None, "data"), 16, P("data", None)),
        ((8, 4, 6), P(None, "model", "data"), 8, P(("data", "model"), None)),
        ((96,), P("data"), 8, P(None)),
    ],
    ids=["half a block", "blocks over two axes", "a block and a half"],
)
@both_bits
def test_blocks_over_several_devices_live_where_they_are_whole(shape, spec, block, stored, codec):
    """The numbers are those of one device, and the codes are shared out where axes allow it."""
    where = mesh(AxisType.Explicit, *((2, 4) if len(shape) == 3 else (8, 1)))
    tx, start, g = (
        optimizer(dataclasses.replace(codec, block=block)),
        *(normal_tree(i, {"w": shape}) for i in "pg"),
    )
    step = jax.jit(step_of(tx))
    expected = step(g, tx.init(start), start)
    with jax.set_mesh(where):
        placed, g = (place(tree, where, {"w": spec}) for tree in (start, g))
        state = tx.init(placed)
        scales = state.inner_state.inner[0].mu["w"].absmax
        assert scales.sharding.is_equivalent_to(NamedSharding(where, stored), scales.ndim)
        got = step(g, state, placed)
        text = step.lower(g, state, placed).compile().as_text()
    assert got[0]["w"].sharding.is_equivalent_to(placed["w"].sharding, len(shape))
    assert_same_run(got, expected)
    gathers = [line for line in all_collectives(text) if "all-gather" in line]
    assert len(shape) == 1 or beyond_flags(gathers) == []


@pytest.mark.parametrize(
    ("data", "model", "kind"),
    [
        (4, 1, AxisType.Explicit),
        (8, 1, AxisType.Explicit),
        pytest.param(2, 1, AxisType.Explicit, marks=pytest.mark.slow),
        pytest.param(4, 2, AxisType.Auto, marks=pytest.mark.slow),
        (1, 1, None),
    ],
    ids=str,
)
@both_bits
def test_a_run_goes_on_on_another_mesh(codec, data, model, kind, tmp_path):
    """Saved from a mesh of 4 devices: the next steps are the same there, and elsewhere."""
    tx = optimizer(codec)
    grads = [normal_tree(i, SHAPES) for i in range(4)]
    step = jax.jit(step_of(tx))
    first = mesh(AxisType.Explicit, 4)
    with jax.set_mesh(first):
        current = place(normal_tree("params", SHAPES), first, LEADING)
        state = tx.init(current)
        for g in grads[:2]:
            current, state = step(place(g, first, LEADING), state, current)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run", {"params": current, "state": state})
        for g in grads[2:]:
            current, state = step(place(g, first, LEADING), state, current)

    def restored(start):
        like = jax.eval_shape(lambda: {"params": start, "state": tx.init(start)})
        like["params"] = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
        like["state"] = jax.tree.map(ocp.utils.to_shape_dtype_struct, jax.jit(tx.init)(start))
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(tmp_path / "run", like)

    def finish(put):
        run = restored(put(normal_tree("params", SHAPES)))
        other, other_state = run["params"], run["state"]
        for g in grads[2:]:
            other, other_state = step(put(g), other_state, other)
        if (data, kind) == (4, AxisType.Explicit):
            assert_equal((other, other_state), (current, state))
        assert_same_run((other, other_state), (current, state))

    if kind is None:
        finish(lambda tree: tree)
    else:
        second = mesh(kind, data, model)
        with jax.set_mesh(second):
            finish(lambda tree: place(tree, second, LEADING))
