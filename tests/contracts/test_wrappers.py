"""Optax's own wrappers around whole recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import (
    a_case_of_each_kind,
    assert_close,
    assert_equal,
    every_case,
    every_other_case,
    gradients,
    jitted,
    params,
    run,
)
from tolerances import reordered

import optax_structured as oxs


@a_case_of_each_kind
def test_multi_steps_average_the_gradients(case):
    grads = [gradients(i) for i in range(6)]
    got, _ = run(optax.MultiSteps(case.build(), 2), params(), grads)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    expected, _ = run(case.build(), params(), means)
    assert_close(got, expected, 10 * reordered(jnp.float32))


@a_case_of_each_kind
def test_apply_if_finite_skips_a_poisoned_step(case):
    good = [gradients(i) for i in range(4)]
    bad = jax.tree.map(lambda g: g.at[...].set(jnp.nan), good[0])
    got, state = run(
        optax.apply_if_finite(case.build(), max_consecutive_errors=3),
        params(),
        [good[0], good[1], bad, good[2], bad, bad, good[3]],
    )
    expected, plain_state = run(optax.apply_if_finite(case.build(), 3), params(), good)
    assert int(state.total_notfinite) == 3
    assert_equal(got, expected)
    assert_equal(state.inner_state, plain_state.inner_state)


@a_case_of_each_kind
def test_masked_leaves_pass_through(case):
    mask = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    grads = [gradients(i) for i in range(3)]
    tx = optax.masked(case.build(), mask)
    got, _ = run(tx, params(), grads)
    expected, _ = run(case.build(), params(), grads)
    assert_close(got["dense"]["kernel"], expected["dense"]["kernel"], reordered(jnp.float32))
    passed = jax.tree.map(lambda p, *g: p + g[0] + g[1] + g[2], params(), *grads)
    assert_close(got["dense"]["bias"], passed["dense"]["bias"], reordered(jnp.float32))


@a_case_of_each_kind
def test_partition_by_rules(case):
    labels = oxs.rules((r"bias|gain", "frozen"), default="trained").labels
    tx = optax.partition({"trained": case.build(), "frozen": optax.set_to_zero()}, labels)
    grads = [gradients(i) for i in range(3)]
    got, _ = run(tx, params(), grads)
    assert_equal(got["dense"]["bias"], params()["dense"]["bias"])
    expected, _ = run(case.build(), params(), grads)
    assert_close(got["dense"]["kernel"], expected["dense"]["kernel"], reordered(jnp.float32))


@every_case
def test_all_of_them_around_one_another(case):
    """One program for each line: frozen leaves, clipped means of two gradients, one of them bad."""
    frozen = () if case.coupled else ((r"bias|gain", "frozen"),)  # one number for all leaves
    parts = {"trained": case.build(), "frozen": optax.set_to_zero()}
    partition = optax.partition(parts, oxs.rules(*frozen, default="trained").labels)
    means = optax.MultiSteps(optax.chain(optax.clip(0.5), partition), 2)
    tx = optax.apply_if_finite(means.gradient_transformation(), max_consecutive_errors=3)

    good = [gradients(i) for i in range(4)]
    bad = jax.tree.map(lambda g: g.at[...].set(jnp.nan), good[0])
    got, state = run(tx, params(), [good[0], bad, *good[1:3], bad, bad, good[3]])
    assert int(state.total_notfinite) == 3
    clipped = [
        jax.tree.map(lambda a, b: jnp.clip((a + b) / 2, -0.5, 0.5), *pair)
        for pair in (good[:2], good[2:])
    ]
    expected, _ = run(case.build(), params(), clipped)
    if frozen:
        expected = {
            "dense": {"kernel": expected["dense"]["kernel"], "bias": params()["dense"]["bias"]},
            "gain": params()["gain"],
        }
    assert_close(got, expected, 10 * reordered(jnp.float32))


@every_case
def test_tree_map_params_keeps_the_state(case):
    tx = case.build()
    state = tx.init(params())
    assert_equal(optax.tree.map_params(tx, lambda x: x, state), state)


@every_other_case
def test_tree_map_params_finds_the_parameter_like_leaves(case):
    if case.short:
        pytest.skip("holds arrays that are no parameter's")
    tx = case.build()
    state = tx.init(params())
    shapes = [np.shape(x) for x in jax.tree.leaves(params())]
    marked = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    marks = jax.tree.leaves(marked)
    assert marks.count("param") % len(shapes) == 0
    for mark, leaf in zip(marks, jax.tree.leaves(state), strict=True):
        assert (mark == "param") <= (leaf.shape in shapes)
        assert (mark == "other") <= (leaf.shape == ())


@a_case_of_each_kind
def test_unknown_extra_arguments_are_ignored(case):
    tx = case.build()
    start, grads = params(), gradients(0)
    state = tx.init(start)
    expected, _ = jitted(tx)(grads, state, start)
    extra = {"value": 1.0, "an_argument_nobody_knows": object()}
    updates, _ = jax.jit(lambda *args: tx.update(*args, **extra))(grads, state, start)
    got = optax.apply_updates(start, updates)
    assert_close(got, expected, reordered(jnp.float32))


@a_case_of_each_kind
def test_gradient_side_transformations_go_before(case):
    grads = [gradients(i) for i in range(2)]
    clipped = [jax.tree.map(lambda g: jnp.clip(g, -0.5, 0.5), g) for g in grads]
    got, _ = run(optax.chain(optax.clip(0.5), case.build()), params(), grads)
    expected, _ = run(case.build(), params(), clipped)
    assert_close(got, expected, reordered(jnp.float32))
