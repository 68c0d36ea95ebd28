"""Schedules on every scalar, passed directly or through `optax.inject_hyperparams`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from recipes_table import assert_close, every_case, gradients, jitted, params, run
from tolerances import reordered


def ramp(name, value):
    """A schedule that moves at every step, and stays in the range of its scalar."""
    if name in ("momentum", "b1", "b2"):
        return lambda count: value * (1 - 0.05 * jnp.asarray(count, float))
    return lambda count: value * (1 + 0.3 * jnp.asarray(count, float))


def ramps(case):
    return {name: ramp(name, value) for name, value in case.scalars.items()}


@every_case
def test_injected_schedules_equal_direct_schedules_and_matter(case):
    """Past a restart too: schedules are functions of the steps of the whole run."""
    grads = [gradients(i) for i in range(4)]
    expected, _ = run(case.build(**ramps(case)), params(), grads)
    plain, _ = run(case.build(), params(), grads)
    assert not jnp.array_equal(expected["dense"]["kernel"], plain["dense"]["kernel"])
    injected = optax.inject_hyperparams(case.make)(**case.fixed, **ramps(case))
    got, state = run(injected, params(), grads)
    assert_close(got, expected, 10 * reordered(jnp.float32))
    for name, schedule in ramps(case).items():
        np.testing.assert_allclose(state.hyperparams[name], schedule(3), rtol=1e-6)


@every_case
def test_numbers_set_between_steps_equal_constant_schedules(case):
    tx = optax.inject_hyperparams(case.make)(**case.fixed, **case.scalars)
    start, grads = params(), gradients(0)
    state = tx.init(start)
    state.hyperparams["learning_rate"] = jnp.asarray(2 * case.scalars["learning_rate"])
    got, _ = jitted(tx)(grads, state, start)
    doubled = {**case.scalars, "learning_rate": 2 * case.scalars["learning_rate"]}
    constant = {name: optax.constant_schedule(x) for name, x in doubled.items()}
    expected, _ = run(case.build(**constant), start, [grads])
    assert_close(got, expected, 10 * reordered(jnp.float32))


@every_case
def test_scalars_may_be_traced(case):
    start, grads = params(), gradients(0)

    @jax.jit
    def first_step(scalars):
        tx = case.build(**scalars)
        return tx.update(grads, tx.init(start), start)[0]

    got = optax.apply_updates(start, first_step(dict(case.scalars)))
    expected, _ = run(case.build(), start, [grads])
    assert_close(got, expected, 10 * reordered(jnp.float32))


@every_case
def test_values_do_not_change_the_structure_of_the_state(case):
    """A run goes on with other settings, and under `inject_hyperparams`, from the state it has."""
    made = lambda tx: jax.tree.flatten(jax.eval_shape(tx.init, params()))  # noqa: E731
    expected = made(case.build())
    # The eps of a proximal metric is above zero, as is what divides by itself.
    above = {"damping", "c_p"} | (set() if case.compressed else {"eps"})
    zeros = {n: 1.0 if n in above else 0.0 for n in case.scalars}
    assert made(case.build(**zeros)) == expected
    for values in (case.scalars, zeros):
        injected = optax.inject_hyperparams(case.make)(**case.fixed, **values)
        inner = jax.eval_shape(injected.init, params()).inner_state
        assert jax.tree.flatten(inner) == expected
