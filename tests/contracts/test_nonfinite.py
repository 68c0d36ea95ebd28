"""A step whose gradients are not all finite changes nothing, for every recipe."""

import jax
import jax.numpy as jnp
import pytest
from recipes_table import CASES, assert_equal, every_case, gradients, jitted, params

import optax_structured as oxs
from optax_structured.diagnostics import nonfinite
from optax_structured.recipes.registry import RECIPES
from optax_structured.transforms import SkipNonfiniteState

STEPS = 4  # the first, a refit, a step between two, a refit


def poisoned(gradient, leaf, bad):
    """With one bad entry in one leaf."""
    leaves, structure = jax.tree.flatten(gradient)
    flat = leaves[leaf].ravel().at[-1].set(bad)
    leaves[leaf] = flat.reshape(leaves[leaf].shape)
    return structure.unflatten(leaves)


@every_case
def test_weights_and_state_stay_bit_for_bit_at_every_step(case):
    tx = oxs.skip_nonfinite(case.build())
    step = jitted(tx)
    current, state = params(), tx.init(params())
    for t in range(STEPS):
        bad = (jnp.nan, -jnp.inf)[t % 2]
        got, skipped = step(poisoned(gradients(t), t % 3, bad), state, current)
        assert [int(x) for x in nonfinite(skipped)] == [t + 1, 1]
        assert_equal(got, current)
        assert_equal(skipped.inner_state, state.inner_state)
        current, state = step(gradients(t), skipped, current)  # training goes on
        assert [int(x) for x in nonfinite(state)] == [t + 1, 0]
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((current, state)))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in RECIPES], ids=lambda c: c.name)
def test_recipes_count_by_themselves(case):
    if case.name not in ("adamw", "lion"):  # of optax
        assert isinstance(jax.eval_shape(case.build().init, params()), SkipNonfiniteState)
