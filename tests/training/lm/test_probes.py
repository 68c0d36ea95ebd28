"""The diagnostics of a run: asked at every evaluation, one row a low-rank leaf."""

import jax.numpy as jnp
import pytest
from training_lm_small import experiment, fresh

from optax_structured import diagnostics
from optax_structured.training.lm import loop, plots


@pytest.fixture
def measured(monkeypatch):
    def captured_energy(state, gradient, low_rank):
        del state, low_rank
        matrix = gradient["block_0"]["mlp"]["up"]["kernel"]
        return {"block_0/mlp/up/kernel": jnp.linalg.norm(matrix)[None]}

    monkeypatch.setattr(diagnostics, "captured_energy", captured_energy, raising=False)


def test_every_evaluation_has_a_row_a_leaf(measured, tmp_path):
    run = loop.train(fresh("galore"), tmp_path)
    rows = [row for row in run.leaves if row["path"] == "block_0/mlp/up/kernel"]
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert all(row["captured_energy"] > 0 for row in rows)
    again = loop.train(fresh("galore"), tmp_path, resume=True)
    assert again.leaves == run.leaves
    plots.draw_leaves(run.leaves, "title", tmp_path)
    assert (tmp_path / plots.LEAVES).exists()


def test_full_rank_has_none(measured, tmp_path):
    run = loop.train(experiment("adamw"), tmp_path, stop_after=5)
    assert run.leaves == []
    plots.draw_leaves(run.leaves, "title", tmp_path)
    assert not (tmp_path / plots.LEAVES).exists()
