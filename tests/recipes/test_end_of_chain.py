"""Nothing may follow some recipes, and a function says whether something does."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_structured as oxs
from optax_structured.recipes import check_nothing_follows

PARAMS = {"kernel": jax.ShapeDtypeStruct((8, 4), "float32"), "bias": jnp.ones(4)}
GROUPS, RANK = oxs.GroupLasso(-2), oxs.LowRank(2)
RAMDA = oxs.ramda(0.1, GROUPS, 1e-3)

LAST = {
    "ramda": RAMDA,
    "rmda": oxs.rmda(0.1, GROUPS, 1e-3),
    "prox_sgd": oxs.prox_sgd(0.1, GROUPS, 1e-3),
    "prox_sgd_relaxed": oxs.prox_sgd_relaxed(0.1, GROUPS, 1e-3),
    "prox_adam": oxs.prox_adam(0.1, GROUPS, 1e-3),
    "prox_ssi": oxs.prox_ssi(0.1, GROUPS, 1e-3),
    "q_galore": oxs.q_galore(0.1, RANK),
    "grad_norm_lorp": oxs.grad_norm_lorp(0.1, RANK),
    "grad_norm_lorp-lookahead": oxs.grad_norm_lorp(0.1, RANK, mode="lookahead"),
}
AFTER = {
    "scale": (optax.scale(0.5), "'mul' acts"),
    "negative": (optax.scale(-1.0), "'mul' acts"),
    "decay": (optax.add_decayed_weights(0.1), "'add' acts"),
    "clip": (optax.clip(1.0), "'min' acts"),
    "momentum": (optax.trace(0.9), "'add' acts"),
}
FINE = {
    "clip before": lambda recipe: optax.chain(optax.clip(1.0), recipe),
    "identity after": lambda recipe: optax.chain(recipe, optax.identity()),
    "multi steps": lambda recipe: optax.MultiSteps(recipe, 2),
    "accumulate": lambda recipe: oxs.accumulate(recipe, 2),
    "apply if finite": lambda recipe: optax.apply_if_finite(recipe, 3),
    "restarts": lambda recipe: oxs.restart_at(recipe, (3,)),
    "masked": lambda recipe: optax.masked(recipe, {"kernel": True, "bias": False}),
    "partition": lambda recipe: optax.partition(
        {"ours": recipe, "adam": optax.adam(0.1)}, {"kernel": "ours", "bias": "adam"}
    ),
}


@pytest.mark.parametrize("recipe", LAST)
def test_what_follows_a_recipe_is_found(recipe):
    check_nothing_follows(LAST[recipe], PARAMS)
    with pytest.raises(ValueError, match="'mul' acts on the updates of a recipe after which noth"):
        check_nothing_follows(optax.chain(LAST[recipe], optax.scale(0.5)), PARAMS)


@pytest.mark.parametrize(("element", "message"), AFTER.values(), ids=AFTER)
@pytest.mark.parametrize("around", ["apply if finite", "multi steps", "partition"])
def test_whatever_it_is_and_whatever_is_around_it(element, message, around):
    with pytest.raises(ValueError, match=message):
        check_nothing_follows(FINE[around](optax.chain(RAMDA, element)), PARAMS)


@pytest.mark.parametrize("around", FINE)
def test_wrappers_that_only_wait_or_skip_are_fine(around):
    tx = FINE[around](RAMDA)
    check_nothing_follows(tx, PARAMS)
    with pytest.raises(ValueError, match="'mul' acts"):
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
        check_nothing_follows(optax.chain(tx, optax.scale(0.5)), PARAMS)


def test_injected_hyperparameters():
    tx = optax.inject_hyperparams(oxs.ramda)(0.1, GROUPS, 1e-3)
    check_nothing_follows(tx, PARAMS)
    check_nothing_follows(optax.chain(tx), PARAMS)


def test_other_optimizers_have_no_end_to_check():
    by_hand = optax.chain(oxs.dual_averaging(0.1), oxs.prox_step(GROUPS, 0.1), optax.scale(0.1))
    for tx in (optax.adam(0.1), oxs.galore(0.1, RANK), by_hand):
        with pytest.raises(ValueError, match="no recipe after which nothing may follow is in this"):
            check_nothing_follows(tx, PARAMS)
