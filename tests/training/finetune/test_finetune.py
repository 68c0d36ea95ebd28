"""The task `finetune`: learns, keeps the frozen weights, goes on bit for bit, writes an adapter."""

import functools

import jax
import numpy as np
import pytest
from rich.console import Console

from optax_structured import adapters
from optax_structured.training import loop, run
from optax_structured.training.finetune import methods
from optax_structured.training.finetune.task import ADAPTER, Finetune, pretrained

SMALL = {"epochs": 4, "pretrain_epochs": 3}


@functools.cache
def task(recipe="lora", **given):
    return run.new(Finetune, {"recipe": recipe, **SMALL, **given})


@pytest.mark.slow
def test_it_learns_goes_on_bit_for_bit_and_writes_its_adapter(tmp_path):
    one = task()
    before = jax.tree.map(np.array, one.frozen)
    whole = loop.train(one, tmp_path / "whole")
    loop.train(one, tmp_path / "parts", stop_after=2)
    parts = loop.train(one, tmp_path / "parts", resume=True)
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
    jax.tree.map(np.testing.assert_array_equal, one.frozen, before)
    errors = [row["error"] for row in whole.history.rows]
    assert errors[-1] < 0.6 * 0.8  # of the error of a guess
    one.report(whole.state, whole.history, tmp_path, Console(quiet=True))
    loaded = adapters.load(tmp_path / ADAPTER, pretrained(SMALL["pretrain_epochs"]))
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(whole.state.params))
    assert (tmp_path / "spectra.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", methods.METHODS)
def test_every_method_lowers_the_loss(recipe, tmp_path):
    result = loop.train(task(recipe), tmp_path / "run")
    losses = result.history.losses
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"recipe": "full", "rank": 3}, "has no rank"),
        ({"recipe": "lora", "strength": 0.1}, "has no penalty"),
        ({"state_bits": 8}, "leave --state-bits out"),
        ({"rank": 0}, "at least 1"),
        ({"recipe": "dora"}, "recipe"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(ValueError, match=message):
        run.new(Finetune, given)
