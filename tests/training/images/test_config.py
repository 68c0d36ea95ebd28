"""Configurations: published defaults, checks, and the round trip through a run folder."""

import math

import jax
import pytest

import optax_structured as oxs
from optax_structured.recipes.registry import RECIPES
from optax_structured.training import folder
from optax_structured.training.config import check_same, given_only
from optax_structured.training.images import recipes
from optax_structured.training.images.config import Config


def make(**given):
    return Config(train_size=1442, **given)


def test_defaults_are_the_published_ones_in_a_long_run():
    chosen = make(recipe="ramda", epochs=6000)
    assert (chosen.learning_rate, chosen.strength) == (1e-2, 1e-3)
    assert (chosen.momentum, chosen.eps) == (0.99, 1e-6)
    assert chosen.milestones == (1200, 2400, 3600, 4800)
    assert make(recipe="rmda", epochs=6000).learning_rate == 0.1
    assert make(recipe="adamw").strength == 0
    assert make(recipe="prox_adam", regularizer="nuclear").strength == 3.5e-3
    assert make(recipe="ramda", regularizer="none").strength == 0


@pytest.mark.parametrize("epochs", [2, 10, 50])
def test_a_short_run_averages_less_so_that_w_ends_structured(epochs):
    """c sqrt(i) reaches 1 within the first fifth of the last stage, as when published."""
    chosen = make(recipe="ramda", epochs=epochs)
    steps = (epochs - chosen.milestones[-1]) * (1442 // chosen.batch_size)
    stages = oxs.Stages(tuple(m * (1442 // chosen.batch_size) for m in chosen.milestones))
    momentum = stages.momentum(chosen.momentum)
    assert momentum(stages.milestones[-1] + math.ceil(steps / 5)) < 1e-3
    assert make(recipe="ramda", epochs=epochs, momentum=0.99).momentum == 0.99
    assert make(recipe="prox_sgd", epochs=epochs).momentum == 0.9


def test_milestones_and_stages():
    assert make(epochs=10, stages=2).milestones == (5,)
    assert make(epochs=10, stages=1).milestones == ()
    assert make(epochs=10, milestones=(3, 7)).milestones == (3, 7)
    assert make(epochs=1).milestones == ()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"recipe": "ramd"}, "choose one of adamw, .*; did you mean 'ramda'"),
        (
            {"recipe": "lion"},
            "choose one of adamw, ramda, rmda, .*, prox_ssi, adamw_pruned$",
        ),
        ({"regularizer": "lasso"}, "choose one of group_lasso, l1, nuclear, none"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"strength": -1.0}, "strength must be a finite number of at least 0"),
        ({"strength": math.nan}, "strength must be"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"state_bits": 16}, "state_bits must be one of 32, 8, 4, got 16"),
        (
            {"recipe": "rmda", "state_bits": 4},
            "'rmda' keeps nothing but a sum of .* one of adamw, ramda, .* adamw_pruned$",
        ),
        ({"recipe": "rmda", "eps": 1e-6}, "'rmda' has no eps; leave --eps out"),
        ({"recipe": "adamw", "strength": 1e-3}, "would have no effect with recipe 'adamw'"),
        ({"regularizer": "none", "strength": 1e-3}, "no effect with .* regularizer 'none'"),
        ({"milestones": (3, 200)}, "increasing epochs between 1 and 99 .* got 3, 200"),
        ({"milestones": (5, 3)}, "increasing epochs"),
        ({"milestones": (5,), "stages": 2}, "not both"),
        ({"stages": 0}, "epochs and stages must be at least 1, got 100 and 0"),
        ({"epochs": 0}, "epochs and stages must be at least 1, got 0 and 5"),
        ({"batch_size": 1443}, "between 1 and the 1442 training images, got 1443"),
        ({"batch_size": 0}, "between 1 and the 1442"),
    ],
)
def test_bad_options_are_sentences(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**given)


def test_round_trip_and_resuming_with_other_options(tmp_path):
    chosen = make(seed=3)
    folder.save_config(chosen, tmp_path)
    assert folder.load_config(tmp_path, Config) == chosen
    check_same(chosen, {"seed": 3, "epochs": None, "stages": 5, "milestones": (20, 40, 60, 80)})
    with pytest.raises(ValueError, match="seed is 3 there and 4 here; leave these options out"):
        check_same(chosen, {"seed": 4})
    assert given_only({"seed": 0, "epochs": None}) == {"seed": 0}
    longer = chosen.extended(200)
    folder.save_config(longer, tmp_path)
    assert folder.load_config(tmp_path, Config) == longer
    assert longer.milestones == chosen.milestones and longer.momentum == chosen.momentum


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder: it has no config.json"):
        folder.load_config(tmp_path, Config)
    (tmp_path / "config.json").write_text('{"milestones": []}')
    with pytest.raises(ValueError, match="is not the configuration of a run"):
        folder.load_config(tmp_path, Config)


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", recipes.REGULARIZERS)
@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name in RECIPES])
def test_every_recipe_takes_a_step_with_every_regularizer(name, regularizer):
    structure = recipes.structure(regularizer)
    chosen = make(recipe=name, regularizer=regularizer)
    params = {
        "Conv_0": {"kernel": jax.numpy.ones((2, 2, 3, 4)), "bias": jax.numpy.ones(4)},
        "Dense_0": {"kernel": jax.numpy.ones((4, 3)), "bias": jax.numpy.ones(3)},
    }
    optimizer = recipes.build(chosen, chosen.learning_rate, structure, oxs.Stages((1, 2)))
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(params, state, params)
    assert all(jax.numpy.isfinite(u).all() for u in jax.tree.leaves(updates))
    if RECIPES[name].averages:
        assert jax.tree.structure(oxs.prox_point(state)) == jax.tree.structure(params)
