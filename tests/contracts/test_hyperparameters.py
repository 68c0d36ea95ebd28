"""Schedules on every scalar, passed directly or through `optax.inject_hyperparams`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import CASES, assert_close, every_case, gradients, params, run
from tolerances import reordered

EACH_SCALAR = [(case, name) for case in CASES for name in case.scalars]
SETTABLE = [case for case in CASES if "learning_rate" in case.scalars]


def ramp(name, value):
    """A schedule that moves at every step, and stays in the range of its scalar."""
    if name in ("momentum", "b1", "b2"):
        return lambda count: value * (1 - 0.05 * jnp.asarray(count, float))
    return lambda count: value * (1 + 0.3 * jnp.asarray(count, float))


def ramps(case):
    return {name: ramp(name, value) for name, value in case.scalars.items()}


@pytest.mark.parametrize(
    ("case", "name"), EACH_SCALAR, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_constant_schedule_equals_number(case, name):
    grads = [gradients(i) for i in range(3)]
    tx = case.build(**{name: optax.constant_schedule(case.scalars[name])})
    expected, _ = run(case.build(), params(), grads)
    got, _ = run(tx, params(), grads)
    assert_close(got, expected, 10 * reordered(jnp.float32))


@every_case
def test_injected_schedules_equal_direct_schedules(case):
    """Past a restart too: schedules are functions of the steps of the whole run."""
    grads = [gradients(i) for i in range(4)]
    expected, _ = run(case.build(**ramps(case)), params(), grads)
    injected = optax.inject_hyperparams(case.make)(**case.fixed, **ramps(case))
    got, state = run(injected, params(), grads)
    assert_close(got, expected, 10 * reordered(jnp.float32))
    for name, schedule in ramps(case).items():
        np.testing.assert_allclose(state.hyperparams[name], schedule(3), rtol=1e-6)


@every_case
def test_schedules_matter(case):
    grads = [gradients(i) for i in range(4)]
    got, _ = run(case.build(**ramps(case)), params(), grads)
    plain, _ = run(case.build(), params(), grads)
    assert not jnp.array_equal(got["stack"], plain["stack"])


@every_case
def test_injected_numbers_can_be_set_between_steps(case):
    tx = optax.inject_hyperparams(case.make)(**case.fixed, **case.scalars)
    start, grads = params(), gradients(0)
    state = tx.init(start)
    update = jax.jit(tx.update)
    state.hyperparams["learning_rate"] = jnp.asarray(2 * case.scalars["learning_rate"])
    got, _ = update(grads, state, start)
    other = case.build(learning_rate=2 * case.scalars["learning_rate"])
    expected, _ = jax.jit(other.update)(grads, other.init(start), start)
    assert_close(got, expected, 10 * reordered(jnp.float32))


@every_case
def test_scalars_may_be_traced(case):
    start, grads = params(), gradients(0)

    @jax.jit
    def first_step(scalars):
        tx = case.build(**scalars)
        return tx.update(grads, tx.init(start), start)[0]

    tx = case.build()
    expected, _ = tx.update(grads, tx.init(start), start)
    assert_close(
        first_step({k: jnp.asarray(v) for k, v in case.scalars.items()}),
        expected,
        10 * reordered(jnp.float32),
    )
