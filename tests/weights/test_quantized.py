"""Weights in one byte: on a grid inside the optimizer, and in a container of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from recipes_table import assert_equal, normal, normal_tree
from tolerances import rounding

import optax_structured as oxs

GROUP, COUNT = 16, 1000
INT8 = oxs.Affine(group=GROUP)
SHAPES = {"kernel": (8, 12), "odd": (5, 7), "bias": (12,)}
either_codec = pytest.mark.parametrize("codec", [INT8, oxs.Affine(4, GROUP)], ids=repr)


def on_grid(params, codec=INT8):
    """What is exactly on the grid, and whose groups span all levels."""
    return oxs.weights.merge(oxs.weights.quantize_weights(params, codec))


def moved(params, updates, **settings):
    tx = oxs.weights.keep_on_grid(INT8, **settings)
    change, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, change)


def levels(codec):
    """The largest distance between two levels, of any group."""
    return jax.tree.map(
        lambda w: jnp.max(w.code.scale) if hasattr(w, "code") else 0.0,
        oxs.weights.quantize_weights(normal_tree("w", SHAPES), codec),
        is_leaf=lambda w: hasattr(w, "code"),
    )


# The container


@pytest.mark.slow
@either_codec
def test_the_container_holds_matrices_to_half_a_level(codec):
    params = normal_tree("w", SHAPES)
    weights = oxs.weights.quantize_weights(params, codec)
    values = oxs.weights.merge(weights)
    assert jax.tree.structure(values) == jax.tree.structure(params)
    for name, level in levels(codec).items():
        assert jnp.max(jnp.abs(values[name] - params[name])) <= 0.501 * level
    assert weights["bias"] is params["bias"]
    entries, groups = 8 * 12, 8 * 12 / GROUP
    held = sum(x.nbytes for x in jax.tree.leaves(weights["kernel"]))
    assert held == entries * codec.bits / 8 + 5 * groups


@either_codec
@pytest.mark.parametrize("seed", range(3))
def test_an_update_of_zero_changes_no_code(codec, seed):
    weights = oxs.weights.quantize_weights(normal_tree("w", SHAPES), codec)
    zeros = jax.tree.map(jnp.zeros_like, oxs.weights.merge(weights))
    new = oxs.apply_updates(weights, zeros, jax.random.key(seed))
    for name in ("kernel", "odd"):
        old, code = weights[name].code, new[name].code
        assert_equal((code.codes, code.zero), (old.codes, old.zero))
        np.testing.assert_allclose(code.scale, old.scale, rtol=rounding("float32"))
    assert_equal(new["bias"], weights["bias"])


def test_updates_are_right_on_average():
    """Far below a level, and with the variance of a coin: f (1 - f) squared levels."""
    weights = oxs.weights.quantize_weights({"w": normal("w", (8, 12))}, INT8)
    value = oxs.weights.merge(weights)["w"]
    level = jnp.repeat(weights["w"].code.scale.ravel(), GROUP).reshape(8, 12)
    codes = weights["w"].code.codes.astype(int)
    inside = (codes > 5) & (codes < 250)  # the ends of a group stay, and with them the levels
    assert jnp.sum(inside) > 60
    update = jnp.where(inside, 0.3 * level * normal("u", (8, 12)), 0)
    keys = jax.random.split(jax.random.key(0), COUNT)
    step = jax.vmap(lambda key: oxs.apply_updates(weights, {"w": update}, key)["w"].merged())
    drawn = jax.jit(step)(keys)
    fraction = (update / level) % 1
    spread = level * jnp.sqrt(fraction * (1 - fraction))
    error = jnp.abs(jnp.mean(drawn, 0) - value - update)
    assert jnp.all(error <= 4 * spread / COUNT**0.5 + 1e-4 * level)
    assert jnp.all(jnp.abs(jnp.std(drawn, 0) - spread) <= 0.1 * level)


def test_bfloat16_leaves_are_rounded_at_random_and_others_added_to():
    weights = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones(3), "c": None}
    updates = {"a": jnp.full(1000, 1e-3, jnp.bfloat16), "b": jnp.full(3, 0.5), "c": None}
    new = oxs.apply_updates(weights, updates, jax.random.key(0))
    assert new["a"].dtype == jnp.bfloat16 and new["c"] is None
    assert len(jnp.unique(new["a"])) == 2  # 1, which is what it would always be, and the next
    share = jnp.float32(updates["a"][0]) / 2**-7
    assert (
        abs(jnp.mean(new["a"].astype(float)) - 1 - updates["a"][0])
        <= 4 * (share / 1000) ** 0.5 / 128
    )
    np.testing.assert_array_equal(new["b"], 1.5)


def test_weights_in_codes_survive_a_checkpoint(tmp_path):
    weights = oxs.weights.quantize_weights(normal_tree("w", SHAPES), oxs.Affine(4, GROUP))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "w", weights)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, weights)
        restored = checkpointer.restore(tmp_path / "w", like)
    assert_equal(oxs.weights.merge(restored), oxs.weights.merge(weights))


# The element


def test_the_element_and_the_container_agree():
    weights = oxs.weights.quantize_weights(normal_tree("w", SHAPES), INT8)
    params = oxs.weights.merge(weights)
    tx = oxs.weights.keep_on_grid(INT8, seed=3)
    state = tx.init(params)
    for t in range(20):
        updates = jax.tree.map(lambda u: 0.02 * u, normal_tree(t, SHAPES))
        key = jax.random.fold_in(jax.random.key(3), t)
        weights = oxs.apply_updates(weights, updates, key)
        change, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, change)
        for name, value in oxs.weights.merge(weights).items():
            width = jnp.max(jnp.abs(value)) / 127
            assert jnp.max(jnp.abs(value - params[name])) <= 1e-4 * width


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_steps_end_on_the_grid(half):
    """Where the same steps in float32 do, bit for bit."""
    params = on_grid(normal_tree("w", SHAPES))
    updates = normal_tree(0, SHAPES, half)
    wide = jax.tree.map(lambda u: u.astype("float32"), updates)
    assert_equal(moved(params, updates), moved(params, wide))


def test_rounded_to_the_nearest_small_steps_are_lost():
    params = on_grid({"w": normal("w", (8, 12))})
    level = jnp.max(jnp.abs(params["w"])) / 127
    inside = jnp.abs(params["w"]) < 0.3 * 127 * level  # the ends of a group take their levels along
    assert jnp.sum(inside) > 10
    step = {"w": jnp.where(inside, -2e-4, 0)}
    totals = {}
    for stochastic in (True, False):
        tx = oxs.weights.keep_on_grid(INT8, stochastic=stochastic)
        current, state, update = params, tx.init(params), jax.jit(tx.update)
        for _ in range(100):
            change, state = update(step, state, current)
            current = optax.apply_updates(current, change)
        totals[stochastic] = float(jnp.mean((current["w"] - params["w"])[inside]))
    assert abs(totals[False]) <= 1e-4 * level
    assert abs(totals[True] + 0.02) <= 4e-3


def test_draws_differ_between_leaves_steps_and_seeds():
    w = on_grid({"w": normal("w", (8, 12))})["w"]
    params, updates = {"a": w, "b": w}, {"a": jnp.full_like(w, 3e-3), "b": jnp.full_like(w, 3e-3)}
    tx = oxs.weights.keep_on_grid(INT8)
    first, state = tx.update(updates, tx.init(params), params)
    second, _ = tx.update(updates, state, params)
    other, _ = oxs.weights.keep_on_grid(INT8, seed=1).update(updates, tx.init(params), params)
    assert not jnp.array_equal(first["a"], first["b"])
    assert not jnp.array_equal(first["a"], second["a"])
    assert not jnp.array_equal(first["a"], other["a"])
    again, _ = tx.update(updates, tx.init(params), params)
    assert_equal(again, first)


def test_leaves_without_a_codec_pass_through():
    params, updates = normal_tree("w", SHAPES), normal_tree("u", SHAPES)
    tx = oxs.weights.keep_on_grid(oxs.rules(("odd", None), default=INT8))
    got, _ = tx.update(updates, tx.init(params), params)
    assert_equal({**got, "kernel": 0}, {**updates, "kernel": 0})
    assert not jnp.array_equal(got["kernel"], updates["kernel"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_update_that_is_not_finite_counts_as_zero(bad):
    params = on_grid(normal_tree("w", SHAPES))
    updates = jax.tree.map(jnp.zeros_like, params)
    poisoned = {**updates, "kernel": updates["kernel"].at[2, 3].set(bad)}
    assert_equal(moved(params, poisoned), moved(params, updates))


def mesh(kind):
    return Mesh(
        np.asarray(jax.devices("cpu")[:8]).reshape(4, 2), ("x", "y"), axis_types=(kind,) * 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(), P("x"), P("x", "y")], ids=str)
def test_every_mesh_draws_the_same(kind, spec):
    """Replicas do not drift apart, and a run goes on as it was on another mesh."""
    params, updates = on_grid({"w": normal("w", (8, 64))}), {"w": 0.01 * normal("u", (8, 64))}
    expected = moved(params, updates)["w"]
    sharding = NamedSharding(mesh(kind), spec)
    with jax.set_mesh(mesh(kind)):
        placed = jax.device_put((params, updates), sharding)
        got = jax.jit(moved)(*placed)["w"]
    assert got.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(got, expected, rtol=rounding("float32"), atol=1e-6)


def test_groups_across_devices_are_refused():
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params = {
            "w": jax.device_put(
                normal("w", (8, 24)), NamedSharding(mesh(AxisType.Explicit), P(None, "y"))
            )
        }
        with pytest.raises(ValueError, match="would lie across devices"):
            jax.jit(moved)(params, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_are_refused(dtype):
    params = normal_tree("w", SHAPES, dtype)
    with pytest.raises(ValueError, match=f"'kernel' is {dtype}, which cannot hold the levels"):
        oxs.weights.keep_on_grid(INT8).init(params)
    oxs.weights.keep_on_grid(oxs.rules(("kernel|odd", None), default=INT8)).init(params)
    oxs.weights.quantize_weights(params, INT8)


def test_updates_of_python_numbers():
    weights, key = {"loc": 0.5, "scale": 1.0}, jax.random.key(0)
    new = oxs.apply_updates(weights, {"loc": 0.25, "scale": jnp.ones(())}, key)
    assert (new["loc"], new["scale"]) == (0.75, 2.0) and new["loc"].dtype == jnp.float32
