"""Orbax: save, restore, and the next steps are the same bit for bit."""

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from recipes_table import assert_equal, every_case, gradients, jitted, params, types


@every_case
def test_restored_run_goes_on_identically(case, tmp_path):
    saved_after = 3  # restarts of the table's restarted case are at 2 and 5
    tx = case.build()
    step = jitted(tx)
    current, state = params(), tx.init(params())
    for i in range(saved_after):
        current, state = step(gradients(i), state, current)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"params": current, "state": state})
        checkpointer.wait_until_finished()
        like = {"params": params(), "state": tx.init(params())}
        restored = checkpointer.restore(
            tmp_path / "run", jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        )
    assert types(restored["state"]) == types(state)

    other, other_state = restored["params"], restored["state"]
    for i in range(saved_after, saved_after + 5):
        current, state = step(gradients(i), state, current)
        other, other_state = step(gradients(i), other_state, other)
        assert_equal(other, current)
        assert_equal(other_state, state)


@every_case
def test_state_survives_flattening_to_numpy(case):
    """What every other checkpoint library does."""
    tx = case.build()
    step = jitted(tx)
    start, state = step(gradients(0), tx.init(params()), params())
    leaves, structure = jax.tree.flatten(state)
    restored = structure.unflatten([np.asarray(leaf) for leaf in leaves])
    expected, _ = step(gradients(1), state, start)
    got, _ = step(gradients(1), restored, start)
    assert_equal(got, expected)


@every_case
def test_state_survives_flattening_by_flax(case):
    """Keys are split at the separator when a checkpoint is read: no key of ours may hold one."""
    tx = case.build()
    _, state = jitted(tx)(gradients(0), tx.init(params()), params())
    fresh = tx.init(params())
    for separator in ("/", ".", None):
        flat = flax.traverse_util.flatten_dict(
            flax.serialization.to_state_dict(state), keep_empty_nodes=True, sep=separator
        )
        nested = flax.traverse_util.unflatten_dict(flat, sep=separator)
        assert_equal(flax.serialization.from_state_dict(fresh, nested), state)
