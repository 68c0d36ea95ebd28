"""Configurations of the language-model job: defaults, checks, mistakes as sentences."""

import dataclasses

import pytest
from training_small import FACTS

from optax_structured.training import folder
from optax_structured.training.lm import config, recipes


def make(**given):
    return config.Config(**FACTS, **given)


def test_defaults():
    chosen = make()
    assert (chosen.recipe, chosen.rank, chosen.scale) == ("galore", chosen.width // 4, 0.25)
    assert chosen.evaluate_every * config.EVALUATIONS == chosen.steps
    assert make(recipe="apollo_mini").rank == 1
    assert make(recipe="adamw").rank is None and make(recipe="adamw").period is None
    assert make(width=64).rank == 16


def test_round_trip(tmp_path):
    chosen = make(recipe="fira", projector="svd", seed=2)
    folder.save_config(chosen, tmp_path)
    assert folder.load_config(tmp_path, config.Config) == chosen
    assert folder.stored_fields(tmp_path)["task"] == "lm"
    assert dataclasses.asdict(chosen)["text_sha256"] == FACTS["text_sha256"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"recipe": "galor"}, "unknown recipe 'galor': choose one of adamw, .*mean 'galore'"),
        ({"recipe": "ramda"}, "unknown recipe 'ramda'"),
        ({"recipe": "adamw", "rank": 4}, "'adamw' keeps full rank and has no rank; leave --rank"),
        ({"recipe": "adamw", "period": 4}, "has no period"),
        ({"recipe": "adamw", "projector": "svd"}, "has no projector"),
        ({"recipe": "adamw", "scale": 1.0}, "'adamw' has no scale"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"period": 0}, "period must be a whole number"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"heads": 3}, "width 128 must be a multiple of twice the 3 heads"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"clip": -1.0}, "clip must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"projector": "qr"}, "unknown projector 'qr': choose one of svd"),
        ({"state_bits": 16}, "state_bits must be one of 32, 8, 4, got 16"),
        ({"transport": "move"}, "unknown transport 'move'"),
        ({"sequence": 10**6}, "sequence 1000000 is longer than the .* of the training text"),
    ],
)
def test_bad_options_are_sentences(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**given)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_has_a_complete_configuration(name):
    chosen = make(recipe=name)
    assert (chosen.rank is None) == (recipes.RECIPES[name].period is None)
    assert chosen.learning_rate == recipes.RECIPES[name].learning_rate
    assert chosen.state_bits == (8 if name == "q_galore" else 32)
