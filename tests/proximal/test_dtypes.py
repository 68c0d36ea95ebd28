"""What makes weights exact is computed in their precision, whatever that of gradients and state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import CASES, assert_close, assert_equal, gradients, jitted, params, run
from tolerances import reordered

import optax_structured as oxs

PROXIMAL = {c.name: c for c in CASES if "regularizer" in c.fixed and c.name != "sgd_then_prox"}
KINDS = ("ramda", "ramda_restarted", "rmda", "prox_sgd_relaxed", "prox_adam_amsgrad")
every_recipe = pytest.mark.parametrize("case", PROXIMAL.values(), ids=PROXIMAL)
every_kind = pytest.mark.parametrize("case", [PROXIMAL[k] for k in KINDS], ids=KINDS)
HALVES = ("bfloat16", "float16")


@pytest.mark.slow
@every_recipe
def test_half_precision_gradients_are_taken_as_they_are(case):
    """The run is that of the same gradients in float32, but for the order of sums."""
    tx = case.build()
    narrow = [gradients(i, "bfloat16") for i in range(3)]
    wide = [jax.tree.map(lambda g: g.astype("float32"), grads) for grads in narrow]
    got, expected = run(tx, params(), narrow), run(tx, params(), wide)
    assert_close(got, expected, 20 * reordered("float32"))


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("weights", [*HALVES, "float32"])
def test_prox_step_after_a_plain_optimizer_is_exact(weights, half):
    w = jnp.linspace(0.001, 0.999, 999).astype(weights)
    grads = jnp.where(w > 0.5, -30.0, 0.3).astype(half)

    def after(regularizer, strength):
        tx = optax.chain(optax.sgd(0.1), oxs.prox_step(regularizer, strength, weight=0.1))
        updates, _ = tx.update(grads, tx.init(w), w)
        return optax.apply_updates(w, updates)

    assert_equal(after(oxs.L1(), 1e3), jnp.zeros_like(w))
    boxed = after(oxs.Box(0.0, 1.0), 1.0)
    assert_equal(boxed[w > 0.5], jnp.ones_like(w)[w > 0.5])
    assert jnp.all((boxed >= 0) & (boxed <= 1))


@pytest.mark.slow
@every_kind
def test_state_in_bfloat16_still_learns(case):
    """A share of 0.999 is 1 in bfloat16: moments must be computed wide, whatever they are kept in.

    Roundings of a stored moment add up, so the run is only near.
    """
    tx, steps = case.build(), 2
    narrow = jax.tree.map(
        lambda x: x.astype("bfloat16") if x.dtype == jnp.float32 else x, tx.init(params())
    )
    state, current = narrow, params()
    for i in range(steps):
        current, state = jitted(tx)(gradients(i), state, current)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, narrow)
    expected, _ = run(tx, params(), [gradients(i) for i in range(steps)])
    for got, good, start in zip(*map(jax.tree.leaves, (current, expected, params())), strict=True):
        assert np.linalg.norm(got - good) <= 0.2 * np.linalg.norm(good - start)


def test_a_second_moment_in_bfloat16_is_not_frozen():
    tx = oxs.prox_adam(0.1, oxs.L1(), 0.1)
    state = jax.tree.map(
        lambda x: x.astype("bfloat16") if x.dtype == jnp.float32 else x, tx.init(jnp.ones(3))
    )
    _, state = tx.update(jnp.ones(3), state, jnp.ones(3))
    square = state.inner_state[1].mean_square
    assert jnp.all(square > 0) and square.dtype == jnp.bfloat16


@every_kind
def test_leaves_may_be_python_numbers(case):
    """Outside of jit, as in small Bayesian models."""
    tx = case.build(regularizer=oxs.L1())
    as_arrays = {"loc": jnp.array(0.5), "scale": jnp.array(1.0)}
    current, numbers = as_arrays, jax.tree.map(float, as_arrays)
    state, other = tx.init(current), tx.init(numbers)
    for gradient in (0.3, -0.2):
        grads = dict.fromkeys(numbers, gradient)
        updates, other = tx.update(grads, other, numbers)
        numbers = optax.apply_updates(numbers, updates)
        updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, current)
        current = optax.apply_updates(current, updates)
    assert_equal(numbers, current)


def test_prox_step_after_a_plain_optimizer_takes_python_numbers():
    tx = optax.chain(optax.sgd(0.1), oxs.prox_step(oxs.L1(), 2.0, weight=0.1))
    numbers = {"loc": 0.1, "scale": 1.0}
    updates, _ = tx.update({"loc": 0.3, "scale": 0.0}, tx.init(numbers), numbers)
    got = optax.apply_updates(numbers, updates)
    assert got["loc"] == 0.0 and jnp.allclose(got["scale"], 0.8)


@every_kind
def test_nothing_is_promoted_without_being_told(case):
    start, grads = params("bfloat16"), gradients(0, "float16")
    with jax.numpy_dtype_promotion("strict"):
        tx = case.build()
        updates, _ = jax.eval_shape(tx.update, grads, tx.init(start), start)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1e-20, 1e-38])
@pytest.mark.parametrize("recipe", [oxs.ramda, oxs.prox_adam, oxs.prox_ssi])
def test_a_zero_group_without_a_gradient_stays_with_any_eps(recipe, eps):
    """With a rate that starts at 0 the metric, eps, and the weight of the prox are both tiny."""
    rate = optax.linear_schedule(0.0, 0.1, 4)
    tx = recipe(rate, oxs.GroupLasso(group_axis=-2), 0.01, eps=eps)
    start = jnp.ones((3, 2)).at[0].set(0.0)
    new, _ = run(tx, start, [jnp.ones((3, 2)).at[0].set(0.0)] * 2)
    assert jnp.all(jnp.isfinite(new)) and jnp.all(new[0] == 0.0) and jnp.all(new[1:] < 1.0)
