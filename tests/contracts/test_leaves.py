"""Leaves and trees that are not what a recipe expects: right, or refused in one sentence.

Nothing is compiled here: shapes and types are enough.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import optax
import pytest
from recipes_table import CASES, gradients, params, step_of, types

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
combined = functools.partial(jax.tree.map, lambda x, y: x + 1j * y)

REFUSED = "another tree|belongs to another transformation or to other parameters"
# The states and the arithmetic of optax itself, which `quantized` only stores.
OF_OPTAX = ("adamw_8bit", "adamw_4bit", "lion_8bit")
HOLDS_NOTHING = {
    **dict.fromkeys(("sgd_then_prox", "ponos", "dual_gauss_newton"), "only scalars"),
    **dict.fromkeys(("adagrad_norm", "geometric", "scale_by_batch_size"), "only scalars"),
}
HAS_ANOTHER_ERROR = {"modular_adaptive": "its inner optimizer compares first"}
# What the wrapper of optax does not pass on: there, refusing is all.
TAKE_ARGUMENTS = ("ponos", "storm", "gns", "gns_cg", "dual_gauss_newton")


@every_case
def test_complex_leaves_are_split_as_the_refusal_says(case):
    start, grads = combined(params(), gradients(1)), combined(gradients(0), gradients(1))
    if case.name != "scale_by_batch_size":  # a number times complex ones
        takes = case.name in TAKE_ARGUMENTS
        remedy = "make two real leaves" if takes else "split_real_and_imaginary"
        with pytest.raises(ValueError, match=remedy):
            jax.eval_shape(case.build().init, start)
    if case.name in TAKE_ARGUMENTS:
        return
    split = optax.contrib.split_real_and_imaginary(case.build())
    state = jax.eval_shape(split.init, start)
    new, new_state = jax.eval_shape(step_of(split), grads, state, start)
    assert types(new) == types(start) and types(new_state) == types(state)


@every_case
def test_strict_promotion(case):
    if case.name in OF_OPTAX:
        pytest.skip("optax.adam corrects its bias with a power that strict promotion refuses")
    start, grads = params(), gradients(0)
    with jax.numpy_dtype_promotion("strict"):
        tx = case.make(**case.fixed, **case.scalars)
        state = jax.eval_shape(tx.init, start)
        _, new = jax.eval_shape(tx.update, grads, state, start)
    assert types(new) == types(state)


@every_case
def test_python_numbers_are_leaves(case):
    numbers = {"dense": params()["dense"], "loc": 0.0}
    tx = case.build()
    update = lambda state: tx.update({**numbers, "loc": 1.0}, state, numbers)  # noqa: E731
    state = jax.eval_shape(lambda: tx.init(numbers))
    updates, new = jax.eval_shape(update, state)
    assert types(new) == types(state) or case.name in OF_OPTAX  # whose zeros are weakly typed
    assert updates["loc"].shape == () and jnp.issubdtype(updates["loc"].dtype, jnp.floating)


def without(*path):
    def cut(tree):
        owner = {**tree, "dense": dict(tree["dense"])}
        *first, last = path
        del functools.reduce(operator.getitem, first, owner)[last]
        return owner

    return cut


CHANGES = {
    "a bias is missing": without("dense", "bias"),
    "a kernel is missing": without("dense", "kernel"),
    "a kernel is new": lambda tree: {**tree, "more": jnp.ones((6, 4))},
    "a leaf became None": lambda tree: {**tree, "gain": None},
}


@pytest.mark.parametrize("change", CHANGES)
@every_case
def test_another_tree_than_that_of_init(case, change):
    tx, changed = case.build(), CHANGES[change]
    state = jax.eval_shape(tx.init, params())
    if case.name not in HOLDS_NOTHING | HAS_ANOTHER_ERROR:
        with pytest.raises(ValueError, match=REFUSED):
            jax.eval_shape(tx.update, changed(gradients(0)), state, changed(params()))
    with pytest.raises(ValueError, match=REFUSED):  # of gradients alone
        jax.eval_shape(tx.update, changed(gradients(0)), state, params())
