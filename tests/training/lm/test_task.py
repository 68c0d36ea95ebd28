"""The compiled parts: exact perplexity, the same data for all, one program for every count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import reordered
from training_small import TEXT, fresh_lm, lm

from optax_structured.training.lm import recipes
from optax_structured.training.schedule import shape_of_schedule


@pytest.mark.slow
def test_held_out_loss_is_the_mean_over_every_byte_once():
    one = lm()
    params = one.init().params
    length, losses = one.config.sequence, []
    for start in range(0, len(TEXT.held_out), length):
        targets = TEXT.held_out[start : start + length].astype(int)
        before = TEXT.train[-1] if start == 0 else TEXT.held_out[start - 1]
        inputs = np.concatenate([[before], targets[:-1]]).astype(int)
        losses += list(one.model.losses(params, inputs[None], targets[None])[0])
    assert len(losses) == len(TEXT.held_out)
    found = one.held_out_loss(params)
    assert found == pytest.approx(np.mean(losses), rel=reordered("float32"))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_held_out_loss_does_not_depend_on_the_batch(batch_size):
    params = lm().init().params
    expected = lm().held_out_loss(params)
    found = lm(batch_size=batch_size).held_out_loss(params)
    assert found == pytest.approx(expected, rel=reordered("float32"))


@pytest.mark.slow
def test_steps_are_the_same_whatever_the_calls():
    one = lm()
    whole, losses = one.steps(one.init(), 0, 5)
    parts, first = one.steps(one.init(), 0, 2)
    parts, second = one.steps(parts, 2, 3)
    np.testing.assert_array_equal(losses[:5], np.concatenate([first[:2], second[:3]]))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    nothing, _ = one.steps(parts, 5, 0)
    jax.tree.map(np.testing.assert_array_equal, nothing, whole)


def test_seeds_and_rates_share_what_is_compiled():
    one = lm()
    one.steps(one.init(), 0, 0)
    with jax.no_tracing():
        other = one.variant(seed=1, learning_rate=1e-2)
        start = other.init()
        state, losses = other.steps(start, 0, 3)
        same, _ = one.variant(seed=1).steps(other.init(), 0, 3)
    assert not np.array_equal(losses, one.steps(one.init(), 0, 3)[1])
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, same.params)
    assert any(jax.tree.leaves(moved))
    with pytest.raises(ValueError, match="steps: anything but these two"):
        one.variant(steps=3)


def test_the_rate_warms_up_over_a_tenth_and_stays_at_a_tenth():
    shape = shape_of_schedule(100)
    rates = [float(shape(step)) for step in (0, 9, 10, 55, 100, 300)]
    np.testing.assert_allclose(rates, [0.1, 1.0, 1.0, 0.55, 0.1, 0.1], atol=reordered("float32"))


IN_EVERY_RUN = ("adamw", "galore", "q_galore")


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow)
        for name in recipes.RECIPES
    ],
)
def test_every_recipe_trains(name):
    one = lm(name).variant(learning_rate=1e-2)
    state, losses = one.steps(one.init(), 0, 10)
    assert np.all(np.isfinite(losses)) and losses[9] < losses[0]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("part", recipes.PARTS)
def test_parts_go_by_name(part):
    for name in recipes.PARTS[part]:
        one = fresh_lm("galore", **{part: name})
        assert type(getattr(one.structure.default, part)).__name__ == recipes.PARTS[part][name]


@pytest.mark.slow
def test_stacked_layers_train():
    one = lm("galore", stacked=True, layers=2)
    _, losses = one.steps(one.init(), 0, 10)
    assert np.all(np.isfinite(losses)) and losses[9] < losses[0]


def test_the_bytes_are_those_of_the_arrays():
    for recipe in ("adamw", "galore"):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(lm(recipe).init().opt_state))
        assert lm(recipe).memory.state_bytes == held


@pytest.mark.slow
@pytest.mark.parametrize("recipe, bits", [("adamw", 8), ("galore", 4), ("q_galore", 8)])
def test_bytes_in_codes_are_those_of_the_arrays(recipe, bits):
    """64 wide, so that embedding, head and, of adamw, the matrices have 4096 entries and more."""
    one = lm(recipe, width=64, state_bits=bits)
    params, state = one.init()
    codes = [x for x in jax.tree.leaves(state) if x.dtype == "uint8"]
    assert sum(x.nbytes for x in codes) == one.memory.code_bytes
    # Two moments of what is not projected: embedding and head, and of adamw all matrices.
    large = sum(x.size for x in jax.tree.leaves(params) if x.size >= 4096)
    in_moments = 2 * (large if recipe == "adamw" else 2 * 256 * 64) * bits // 8
    assert in_moments <= one.memory.code_bytes <= 1.1 * in_moments
