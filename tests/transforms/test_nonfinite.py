"""`skip_nonfinite` around any transformation; that all recipes have it is a contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recipes_table import assert_close, assert_equal, gradients, params, run
from tolerances import reordered

import optax_structured as oxs
from optax_structured.diagnostics import nonfinite
from optax_structured.xla.traced import Traced

GROUPS = oxs.GroupLasso(group_axis=-2)
NAN = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(3)}
ONES = jax.tree.map(jnp.ones_like, NAN)

INNER = {
    "adamw": optax.adamw(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),  # the update is the state
    "adafactor": optax.adafactor(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "injected": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 0.0, 5)),
    "multi steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "of a norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "jitted": optax.GradientTransformation(optax.adam(1e-2).init, jax.jit(optax.adam(1e-2).update)),
}
every_inner = pytest.mark.parametrize("name", INNER)


def counts(state):
    return [int(x) for x in nonfinite(state)]


@pytest.mark.slow
@every_inner
def test_finite_steps_are_those_of_the_inner_transformation(name):
    """Bit for bit, operation by operation; the compiler may fuse them in another way."""
    grads = [gradients(i) for i in range(3)]
    for jit in (False, True):
        got, state = run(oxs.skip_nonfinite(INNER[name]), params(), grads, jit=jit)
        expected, plain = run(INNER[name], params(), grads, jit=jit)
        tolerance = reordered(jnp.float32) if jit else 0.0
        assert_close((got, state.inner_state), (expected, plain), tolerance)
        assert counts(state) == [0, 0]


@pytest.mark.slow
@every_inner
def test_a_skipped_step_has_not_been(name):
    tx = oxs.skip_nonfinite(INNER[name])
    good = [gradients(i) for i in range(3)]
    bad = {**good[2], "gain": jnp.asarray(jnp.nan)}
    expected, expected_state = run(tx, params(), good)
    got, state = run(tx, params(), [bad, *good[:2], bad, bad, *good[2:]])
    assert_equal(got, expected)
    assert_equal(state.inner_state, expected_state.inner_state)
    assert counts(state) == [3, 0]


def test_a_sum_that_overflows_is_finite():
    tx = oxs.skip_nonfinite(optax.sgd(1e-30))
    large = jnp.full(8, jnp.finfo(jnp.float32).max)
    updates, state = tx.update(large, tx.init(large))
    assert jnp.all(updates < -1e8) and counts(state) == [0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_dtypes(dtype):
    tx = oxs.skip_nonfinite(optax.trace(0.5))
    start = {"x": jnp.ones(2, dtype), "whole": jnp.ones(2, jnp.int32)}
    _, state = tx.update(start, tx.init(start))
    updates, after = tx.update({**start, "x": start["x"].at[0].set(jnp.nan)}, state)
    assert updates["x"].dtype == start["x"].dtype and not jnp.any(updates["x"])
    assert_equal(after.inner_state.trace["x"], state.inner_state.trace["x"])
    assert counts(after) == [1, 1] and not jnp.any(updates["whole"])


def test_holes_and_empty_trees():
    tx = oxs.skip_nonfinite(optax.adam(1e-2))
    for tree in ({}, {"a": None, "b": optax.MaskedNode()}, {"a": jnp.zeros((0, 3))}):
        updates, state = tx.update(tree, tx.init(tree), tree)
        assert_equal(updates, tree)
        assert counts(state) == [0, 0]


@pytest.mark.slow
def test_nothing_is_wrapped_twice():
    recipe = oxs.prox_sgd(0.1)
    assert oxs.skip_nonfinite(recipe).inner is recipe.inner
    galore = oxs.galore(1e-2, oxs.LowRank(2), inner=oxs.quantized(optax.scale_by_adam()))
    for tx in (
        oxs.skip_nonfinite(optax.clip(1.0), recipe),
        oxs.quantized(recipe, min_size=2),
        oxs.quantized(oxs.skip_nonfinite(optax.adam(0.1))),
        oxs.restart_at(oxs.ramda(0.1), (2,)),
        oxs.q_galore(1e-2, oxs.LowRank(2)),
        oxs.grad_norm_lorp(1e-2, oxs.LowRank(2)),
        galore,
    ):
        state = tx.init({"w": jnp.ones((4, 3))})
        assert str(jax.tree.structure(state)).count("SkipNonfiniteState") == 1


def test_two_recipes_of_a_partition_count_together():
    labels = {"a": "one", "b": "two"}
    tx = optax.partition({"one": oxs.prox_sgd(0.1), "two": oxs.prox_adam(0.1)}, labels)
    state = tx.init(ONES)
    for grads in (NAN, NAN, ONES, NAN):
        _, state = tx.update(grads, state, ONES)
    assert counts(state) == [3, 1]


def test_a_state_without_counts_is_explained():
    with pytest.raises(ValueError, match=r"build the optimizer as skip_nonfinite\(optimizer\)"):
        nonfinite(optax.adam(0.1).init(ONES))


def test_skipped_steps_do_not_count_for_restarts():
    tx = oxs.restart_at(oxs.ramda(0.1, oxs.L1(), 0.1), milestones=(2,))
    expected, expected_state = run(tx, ONES, [ONES] * 3)
    got, state = run(tx, ONES, [ONES, NAN, ONES, NAN, NAN, ONES])
    assert_equal((got, state.inner_state), (expected, expected_state.inner_state))
    assert counts(state) == [3, 0] and int(state.inner_state.steps) == 3


def test_accumulated_gradients_are_judged_by_their_mean():
    got, state = run(
        oxs.accumulate(oxs.skip_nonfinite(optax.sgd(0.1)), 2), ONES, [NAN, ONES, ONES, ONES]
    )
    assert_close(got, jax.tree.map(lambda x: 0.9 * x, ONES), reordered(jnp.float32))
    assert counts(state) == [1, 0]


def test_around_multi_steps_which_would_keep_nan_in_its_sum():
    steps = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    got, state = run(oxs.skip_nonfinite(steps), ONES, [NAN, ONES, ONES, ONES])
    assert_close(got, jax.tree.map(lambda x: 0.9 * x, ONES), reordered(jnp.float32))
    assert counts(state) == [1, 0]


def test_reinit_reads_through():
    tx = oxs.galore(1e-2, oxs.LowRank(2))
    start = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 4))}
    _, state = run(tx, start, [start, {**start, "v": jnp.full((3, 4), jnp.nan)}])
    new = oxs.reinit(tx, state, start, "w")
    assert counts(new) == [1, 1]
    inner = new.inner_state[0].inner
    assert not jnp.any(inner.mu["w"]) and jnp.any(inner.mu["v"])


@pytest.mark.slow
def test_members_of_an_ensemble_are_judged_alone():
    tx = oxs.ramda(0.1, oxs.L1(), 0.1)
    start = jax.tree.map(lambda x: jnp.stack([x, x]), ONES)
    grads = jax.tree.map(lambda good, bad: jnp.stack([good, bad]), ONES, NAN)
    updates, state = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(start), start)
    assert nonfinite(state).skipped.tolist() == [0, 1]
    for leaf in updates.values():
        assert jnp.all(leaf[0] != 0) and not jnp.any(leaf[1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_all_devices_skip_where_one_has_nan(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    place = jax.sharding.NamedSharding(mesh, P("data"))
    start = jax.device_put({"a": jnp.ones((8, 4)), "b": jnp.ones((8, 4))}, place)
    bad = jax.device_put({"a": jnp.ones((8, 4)).at[5, 0].set(jnp.nan), "b": start["b"]}, place)
    tx = oxs.prox_adam(0.1, GROUPS, 1e-3)
    with jax.set_mesh(mesh):
        updates, state = jax.jit(tx.update)(bad, tx.init(start), start)
    assert not any(map(jnp.any, updates.values()))
    assert updates["a"].sharding.is_equivalent_to(place, 2) and counts(state) == [1, 1]


def test_pieces_of_a_leaf_inside_shard_map_agree():
    """And so the counters, which all devices share, are the same everywhere."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    tx, start = oxs.skip_nonfinite(optax.adam(0.1)), jnp.ones(8)
    state = tx.init(start)
    specs = jax.tree.map(lambda x: P("data") if x.ndim else P(), state)
    step = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P("data"), specs)
    )
    updates, after = jax.jit(step)(start.at[3].set(jnp.nan), state)
    assert not jnp.any(updates) and counts(after) == [1, 1]


RANK = 32


def temporaries(tx, leaves=4, shape=(512, 512)):
    start = {f"layer{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(leaves)}

    def step(current, state, grads):
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        start, jax.eval_shape(tx.init, start), start
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(oxs.skip_nonfinite(optax.adamw(1e-3)), id="adamw"),
        pytest.param(oxs.ramda(1e-2, GROUPS, 1e-3), id="ramda"),
        pytest.param(oxs.galore(1e-2, oxs.LowRank(RANK)), id="galore"),
        pytest.param(oxs.fira(1e-2, oxs.LowRank(RANK)), id="fira"),
    ],
)
def test_a_donated_state_is_still_written_in_place(tx):
    """With the selection after the update, adamw alone would need 3 more arrays of a leaf."""
    assert temporaries(tx) <= temporaries(tx.inner) + 4096


def test_the_flag_is_made_once_for_all_leaves():
    """Not again in the kernel of each leaf: that is a program of so many additions squared."""

    def additions(leaves):
        start = [jax.ShapeDtypeStruct((2,), jnp.float32)] * leaves
        tx = oxs.skip_nonfinite(optax.trace(0.9))
        lowered = jax.jit(tx.update).lower(start, jax.eval_shape(tx.init, start))
        return lowered.compile().as_text().count(" add(")

    assert additions(32) <= 5 * additions(8)


def test_a_change_of_an_output_is_seen_by_what_reads_it():
    def program(inputs):
        x, y = inputs
        moment = x + y
        return [moment, jnp.sin(moment), y, moment * 0 + x]

    ones = [jnp.ones(2), jnp.ones(2)]
    double, same = (lambda x: 2 * x), (lambda x: x)
    changed = Traced(program, ones).run(ones, changes=[double, same, double, same])
    np.testing.assert_allclose(changed, [[4, 4], np.sin([4, 4]), [2, 2], [1, 1]], rtol=1e-6)
