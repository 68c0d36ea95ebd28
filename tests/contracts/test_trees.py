"""Trees of every shape: None leaves, empty, scalars, zero-size, abstract."""

import jax
import jax.numpy as jnp
import pytest
from recipes_table import (
    assert_close,
    every_case,
    gradients,
    normal_tree,
    params,
    run,
    step_of,
    types,
)
from tolerances import rounding

TREES = {
    "empty": {},
    "bare_matrix": (4, 3),
    "all_vectors": {"bias": (7,), "gain": ()},
    "all_empty": {"none": (0, 3), "no_inputs": (3, 0)},
    "mixed": {
        "gain": (),
        "bias": (7,),
        "none": (0, 3),
        "no_inputs": (3, 0),
        "kernel": (4, 3),
        "layers": [{"kernel": (3, 4, 2)}],
    },
}


@every_case
def test_trees_keep_their_types(case):
    tx = case.build()
    for name, shapes in TREES.items():
        start, grads = normal_tree("params", shapes), normal_tree(0, shapes)
        state = jax.eval_shape(tx.init, start)
        new, new_state = jax.eval_shape(step_of(tx), grads, state, start)
        assert types(new) == types(start), name
        assert types(new_state) == types(state), name


@every_case
def test_a_mixed_tree_stays_finite(case):
    start, grads = normal_tree("params", TREES["mixed"]), normal_tree(0, TREES["mixed"])
    new, _ = run(case.build(), start, [grads])
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new))


@every_case
def test_none_leaves_stay_none(case):
    if case.coupled:
        pytest.skip("the steps of all leaves share a number")
    full, grads = params(), gradients(0)
    holes = lambda tree: {"dense": {**tree["dense"], "bias": None}, "gain": None}  # noqa: E731
    got, _ = run(case.build(), holes(full), [holes(grads)])
    assert got["gain"] is None
    assert got["dense"]["bias"] is None
    expected, _ = run(case.build(), full, [grads])
    assert_close(got["dense"]["kernel"], expected["dense"]["kernel"], rounding(jnp.float32))


@every_case
def test_abstract_init(case):
    tx = case.build()
    abstract = jax.eval_shape(tx.init, jax.eval_shape(params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tx.init(params())
    )
    new, _ = jax.eval_shape(step_of(tx), jax.eval_shape(lambda: gradients(0)), abstract, params())
    assert jax.tree.structure(new) == jax.tree.structure(params())


@every_case
def test_state_holds_arrays_only(case):
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(case.build().init(params())))
