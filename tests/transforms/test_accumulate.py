"""One inner step for the mean of several gradients, and no inner work in between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import assert_close, gradients, normal, params, types
from tolerances import reordered

import optax_structured as oxs
from optax_structured.transforms import accumulate


def run(tx, grads, current):
    update = jax.jit(tx.update)
    state, trail = tx.init(current), []
    for g in grads:
        updates, state = update(g, state, current)
        current = optax.apply_updates(current, updates)
        trail.append(current)
    return trail, state


def test_equals_the_inner_optimizer_on_the_mean():
    grads = [gradients(i) for i in range(6)]
    means = [jax.tree.map(lambda *g: sum(g) / 3, *grads[i : i + 3]) for i in (0, 3)]
    inner = optax.adamw(0.1)
    got, state = run(accumulate(inner, 3), grads, params())
    expected, _ = run(inner, means, params())
    for at, step in ((2, 0), (5, 1)):
        assert_close(got[at], expected[step], reordered(jnp.float32))
    for at in (0, 1, 3, 4):
        assert_close(got[at], params() if at < 2 else expected[0], reordered(jnp.float32))
    assert (int(state.steps), int(state.waiting)) == (2, 0)


def test_every_one_is_the_inner_optimizer():
    grads = [gradients(i) for i in range(3)]
    got, _ = run(accumulate(optax.adam(0.1), 1), grads, params())
    expected, _ = run(optax.adam(0.1), grads, params())
    assert_close(got[-1], expected[-1], reordered(jnp.float32))


def test_equals_multi_steps():
    grads = [gradients(i) for i in range(4)]
    got, _ = run(accumulate(optax.adam(0.1), 2), grads, params())
    expected, _ = run(optax.MultiSteps(optax.adam(0.1), 2), grads, params())
    assert_close(got[-1], expected[-1], reordered(jnp.float32))


def counting(calls):
    """An identity that tells the host when it runs."""

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("members", [None, 3])
def test_the_inner_update_runs_on_emission_only(members):
    calls = []
    tx = accumulate(counting(calls), 4)
    shape = (2,) if members is None else (members, 2)
    init, update = (tx.init, tx.update) if members is None else map(jax.vmap, (tx.init, tx.update))
    state = init(jnp.ones(shape))
    update = jax.jit(update)
    for _ in range(8):
        _, state = update(jnp.ones(shape), state)
    jax.effects_barrier()
    assert len(calls) == 2  # once for all members


def test_sums_are_float32():
    """Two hundred halves of a unit in the last place of bfloat16."""
    tx = accumulate(optax.identity(), 200)
    state = tx.init(jnp.ones(1, jnp.bfloat16))
    update = jax.jit(tx.update)
    for i in range(200):
        grads = jnp.full(1, 256.0 if i == 0 else 1.0, jnp.bfloat16)
        updates, state = update(grads, state, jnp.ones(1, jnp.bfloat16))
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates.astype(float), (256 + 199) / 200, rtol=4e-3)


def test_a_gradient_with_nan_leaves_no_trace_in_the_sum():
    tx = accumulate(optax.identity(), 2)
    state = tx.init(jnp.ones(1))
    for g, expected in ((np.nan, 0.0), (1.0, np.nan), (1.0, 0.0), (3.0, 2.0)):
        updates, state = tx.update(jnp.full(1, g), state)
        np.testing.assert_array_equal(updates, expected)


def test_params_and_extra_arguments_reach_the_inner_update():
    def update(updates, state, params, *, factor, function, **extra):
        del extra
        return jax.tree.map(lambda u, p: function(factor * u + p), updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = accumulate(inner, 2)

    @jax.jit
    def step(state, factor):
        return tx.update(
            jnp.ones(2), state, jnp.ones(2), factor=factor, function=jnp.square, value=None
        )

    updates, state = step(tx.init(jnp.ones(2)), jnp.float32(2.0))
    np.testing.assert_array_equal(updates, 0.0)
    updates, _ = step(state, jnp.float32(2.0))
    np.testing.assert_array_equal(updates, 9.0)


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None])
def test_bad_number_of_gradients(every):
    with pytest.raises(ValueError, match="every must be a whole number of at least 1"):
        accumulate(optax.sgd(0.1), every)


@pytest.mark.parametrize(("before", "waiting", "after"), [(4, 3, 2), (4, 2, 1), (8, 5, 4)])
def test_resumed_with_another_number_it_takes_a_step(before, waiting, after):
    """With the mean of all that waits; from then on every `after` gradients."""
    tx, other = accumulate(optax.sgd(1.0), before), accumulate(optax.sgd(1.0), after)
    state, given = tx.init(jnp.zeros(1)), [float(i + 1) for i in range(waiting)]
    for g in given:
        _, state = tx.update(jnp.full(1, g), state)
    updates, state = other.update(jnp.full(1, 9.0), state)
    np.testing.assert_allclose(updates, -np.mean([*given, 9.0]))
    for i in range(2 * after):
        updates, state = other.update(jnp.ones(1), state)
        np.testing.assert_array_equal(updates, -1.0 if (i + 1) % after == 0 else 0.0)


def test_resumed_with_a_larger_number_it_goes_on_waiting():
    state = accumulate(optax.sgd(1.0), 2).init(jnp.zeros(1))
    _, state = accumulate(optax.sgd(1.0), 2).update(jnp.ones(1), state)
    tx = accumulate(optax.sgd(1.0), 3)
    updates, state = tx.update(jnp.full(1, 2.0), state)
    np.testing.assert_array_equal(updates, 0.0)
    np.testing.assert_allclose(tx.update(jnp.full(1, 6.0), state)[0], -3.0)


def test_resumed_inside_a_projection_it_takes_a_step():
    def optimizer(every):
        inner = accumulate(optax.scale_by_adam(), every)
        return oxs.low_rank_projection(inner, oxs.LowRank(2, period=8))

    grads = [normal(i, (6, 4)) for i in range(4)]
    state = optimizer(4).init(grads[0])
    for g in grads[:3]:
        _, state = optimizer(4).update(g, state)
    updates, state = optimizer(2).update(grads[3], state)
    assert jnp.any(updates != 0) and int(state.inner.steps) == 1


TREES = {
    "bfloat16 weights": ({"w": jnp.ones((4, 3), jnp.bfloat16)}, {"w": jnp.full((4, 3), 0.5)}),
    "bfloat16 gradients": ({"w": jnp.ones((4, 3))}, {"w": jnp.full((4, 3), 0.5, jnp.bfloat16)}),
    "an int leaf": (
        {"w": jnp.ones((4, 3)), "i": jnp.ones(3, jnp.int32)},
        {"w": jnp.full((4, 3), 0.5), "i": jnp.zeros(3, jnp.int32)},
    ),
    "python numbers": ({"loc": 1.0, "scale": 2.0}, {"loc": 0.5, "scale": 0.25}),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("inner", ["adam", "adan", "lion", "optimistic_gradient_descent"])
def test_dtypes_of_states_and_updates_are_kept(inner, tree):
    weights, grads = TREES[tree]
    tx = accumulate(getattr(optax, inner)(0.1), 2)
    state = tx.init(weights)
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, new = update(grads, state, weights)
        assert types(new) == types(state)
        state = new
    first = jax.tree.leaves(weights)[-1]
    assert not jnp.array_equal(first, first + jax.tree.leaves(updates)[-1])


def test_the_mean_is_not_rounded_to_the_precision_of_the_gradients():
    tx, weights = accumulate(optax.sgd(1.0), 3), jnp.ones(1)
    state = tx.init(weights)
    for g in (1.0, 1.0, 2.0):
        updates, state = tx.update(jnp.full(1, g, jnp.bfloat16), state, weights)
    np.testing.assert_allclose(updates, -4 / 3, rtol=1e-6)


def test_a_state_may_hold_random_keys():
    noise = optax.GradientTransformation(
        lambda params: jax.random.key(0),
        lambda u, key, params=None: (u, jax.random.split(key, 1)[0]),
    )
    tx = accumulate(noise, 1)
    _, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    assert state.inner != jax.random.key(0)
