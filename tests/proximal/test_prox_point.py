"""The prox point read from the state is the one that the last step computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import SHAPES, assert_equal, gradients, jitted, params, run
from tolerances import assert_close, rounding

import optax_structured as oxs

TABLE = oxs.rules(("bias", oxs.L1()), ("gain", None), default=oxs.GroupLasso(group_axis=-2))
MOVING = {
    "learning_rate": lambda count: 0.05 / (1 + 0.1 * count),
    "strength": lambda count: 2.0 * (1 + count),
    "momentum": 0.4,
}
RAMDA = functools.partial(oxs.ramda, regularizer=TABLE, eps=lambda count: 1e-3 / (1 + count))
RMDA = functools.partial(oxs.rmda, regularizer=TABLE)
recipes = pytest.mark.parametrize("recipe", [RAMDA, RMDA], ids=["ramda", "rmda"])


def read_and_kept(tx, steps=3):
    """The point solved again, and the one kept by the same optimizer, after a few steps."""
    read = run(tx(keep_point=False), params(), [gradients(i) for i in range(steps)])[1]
    kept = run(tx(keep_point=True), params(), [gradients(i) for i in range(steps)])[1]
    return oxs.prox_point(read, TABLE), oxs.prox_point(kept)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(g, e, 10 * rounding("float32"))


@pytest.mark.slow
@recipes
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_is_what_the_step_computed(recipe, steps):
    got, expected = read_and_kept(functools.partial(recipe, **MOVING), steps)
    assert_same(got, expected)
    assert steps < 3 or not all(np.all(leaf) for leaf in jax.tree.leaves(got))


WRAPPERS = {
    "restart_at": lambda tx: oxs.restart_at(tx, (2,)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {"dense": True, "gain": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": tx}, {"dense": {"kernel": "a", "bias": "b"}, "gain": "b"}
    ),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_however_deeply_it_is_wrapped(wrap):
    assert_same(*read_and_kept(lambda keep_point: wrap(RAMDA(**MOVING, keep_point=keep_point))))


def test_under_injected_hyperparameters_and_jit():
    injected = optax.inject_hyperparams(oxs.ramda)(0.05, TABLE, 0.3, momentum=0.4)
    _, state = run(injected, params(), [gradients(0)])
    expected = run(oxs.ramda(0.05, TABLE, 0.3, momentum=0.0), params(), [gradients(0)])[0]
    assert_same(jax.jit(lambda s: oxs.prox_point(s, TABLE))(state), expected)


@pytest.mark.slow
def test_of_an_ensemble():
    tx = RAMDA(**MOVING)
    members = [jax.tree.map(lambda p, i=i: (1 + i) * p, params()) for i in range(2)]
    states = [jitted(tx)(gradients(0), tx.init(p), p)[1] for p in members]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    got = jax.vmap(lambda s: oxs.prox_point(s, TABLE))(together)
    for i, state in enumerate(states):
        assert_same(jax.tree.map(lambda x, i=i: x[i], got), oxs.prox_point(state, TABLE))


def test_without_momentum_it_is_the_parameters_exactly_where_they_are_zero():
    tx = RAMDA(**{**MOVING, "momentum": 0.0})
    w, state = run(tx, params(), [gradients(i) for i in range(3)])
    assert_same(oxs.prox_point(state, TABLE), w)


def test_a_kept_point_is_given_as_it_is():
    """With a solver that stops early, the point depends on where it started."""
    early = oxs.ProximalGradient(max_iters=1)
    tx = oxs.ramda(0.05, TABLE, 0.3, momentum=0.4, solver=early, keep_point=True)
    grads = [gradients(i) for i in range(3)]
    before, state = run(tx, params(), grads[:2])
    after, state = jitted(tx)(grads[2], state, before)
    expected = jax.tree.map(lambda a, b: b + (a - b) / 0.6, after, before)
    kept = oxs.prox_point(state, TABLE)
    for got, point in zip(jax.tree.leaves(kept), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, point, rtol=0, atol=1e-5)
    solved = oxs.prox_point(
        tuple(s for s in state.inner_state if type(s).__name__ != "PointState"), TABLE
    )
    assert np.max(np.abs(solved["dense"]["kernel"] - kept["dense"]["kernel"])) > 1e-4


def test_half_precision_parameters_have_a_point_in_float32():
    tx = RAMDA(**MOVING)
    start = params("bfloat16", SHAPES)
    _, state = run(tx, start, [gradients(0, "bfloat16")])
    point = oxs.prox_point(state, TABLE)
    assert {p.dtype for p in jax.tree.leaves(point)} == {jnp.dtype("float32")}
    assert_equal(jax.tree.map(jnp.shape, point), jax.tree.map(jnp.shape, start))


def test_state_in_codes_is_refused():
    code = oxs.Dynamic(block=2).encode(jnp.ones(4))
    state = oxs.ramda(0.1, oxs.L1(), 0.1).init(jnp.ones(4)).inner_state
    state = (state[0]._replace(gradient_sum=code), *state[1:])
    with pytest.raises(ValueError, match="in the codes of quantized.*keep_point=True"):
        oxs.prox_point(state, oxs.L1())
