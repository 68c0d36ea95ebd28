"""The task `finetune`: learns, keeps the frozen weights, goes on bit for bit, writes an adapter."""

import functools

import jax
import numpy as np
import pytest
from rich.console import Console

from optax_structured import adapters
from optax_structured.training import loop, run
from optax_structured.training.finetune import methods
from optax_structured.training.finetune.task import ADAPTER, Finetune
from optax_structured.training.finetune.watching import watched

SMALL = {"epochs": 4, "pretrain_epochs": 3}


@functools.cache
def task(recipe="lora", **given):
    return run.new(Finetune, {"recipe": recipe, **SMALL, **given})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora", "ggpo", "snella"])
def test_it_learns_goes_on_bit_for_bit_and_writes_its_adapter(recipe, tmp_path):
    one = task(recipe)
    before = jax.tree.map(np.array, one.frozen)
    whole = loop.train(one, tmp_path / "whole")
    loop.train(one, tmp_path / "parts", stop_after=2)
    parts = loop.train(one, tmp_path / "parts", resume=True)
    jax.tree.map(np.testing.assert_array_equal, parts.state.params, whole.state.params)
    assert parts.history.rows[-1]["error"] == whole.history.rows[-1]["error"]
    jax.tree.map(np.testing.assert_array_equal, one.frozen, before)
    errors = [row["error"] for row in whole.history.rows]
    assert errors[-1] < 0.6 * 0.8  # of the error of a guess
    one.report(whole.state, whole.history, tmp_path, Console(quiet=True))
    loaded = adapters.load(tmp_path / ADAPTER, one.frozen)
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(whole.state.params))
    assert (tmp_path / "spectra.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", methods.METHODS)
def test_every_method_lowers_the_loss(recipe):
    one = task(recipe)
    state, losses = one.steps(one.init(), 0, one.steps_a_unit)
    state, later = one.steps(state, one.steps_a_unit, one.steps_a_unit)
    assert np.mean(later[: one.steps_a_unit]) < 0.8 * np.mean(losses[: one.steps_a_unit])


@pytest.mark.slow
def test_the_allocator_moves_the_sparsities():
    one = task("snella")
    state, _ = one.steps(one.init(), 0, 20)
    found = np.array([float(x) for x in watched(state.opt_state).sparsity.values()])
    assert len(set(found.tolist())) > 1  # they began as one number
    merged = one.network(state)[1]
    update = np.asarray(merged["Conv_1"]["kernel"] - one.frozen["Conv_1"]["kernel"])
    sparsity = watched(state.opt_state).sparsity["Conv_1/kernel"]
    assert np.mean(update == 0) == pytest.approx(float(sparsity), abs=0.01)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"recipe": "full", "rank": 3}, "has no rank"),
        ({"recipe": "lora", "strength": 0.1}, "has no penalty"),
        ({"state_bits": 8}, "leave --state-bits out"),
        ({"rank": 0}, "at least 1"),
        ({"recipe": "dora"}, "recipe"),
        ({"data": "faces"}, "unknown data 'faces'"),
        ({"layers": 2}, "--layers has a meaning for --data verses only"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(ValueError, match=message):
        run.new(Finetune, given)
