"""The diagnostics of a run: asked at every evaluation, one row a low-rank leaf."""

import pytest
from training_small import lm

from optax_structured.training import loop
from optax_structured.training.lm import plots

LEAVES = 7  # attention and MLP of one layer


@pytest.mark.slow
def test_every_evaluation_has_a_row_a_leaf(tmp_path):
    run = loop.train(lm("fira"), tmp_path)
    assert [row["step"] for row in run.history.leaves] == [5] * LEAVES + [10] * LEAVES + [
        12
    ] * LEAVES
    for row in run.history.leaves:
        assert 0 < row["captured_energy"] < 1 and 1 <= row["effective_rank"] <= 4
        assert 0 < row["subspace_overlap"] < 1.001 and row["limiter_activity"] in (0, 1)
    again = loop.train(lm("fira"), tmp_path, resume=True)
    assert again.history.leaves == run.history.leaves
    plots.draw_leaves(run.history.leaves, 4, "title", tmp_path)
    assert (tmp_path / plots.PICTURE).exists()


@pytest.mark.slow
def test_a_recipe_without_a_limiter_has_no_such_column(tmp_path):
    run = loop.train(lm("galore"), tmp_path, stop_after=5)
    assert run.history.leaves[0].keys() >= {"captured_energy", "subspace_overlap"}
    assert "limiter_activity" not in run.history.leaves[0]


@pytest.mark.slow
def test_full_rank_has_none(tmp_path):
    run = loop.train(lm("adamw"), tmp_path, stop_after=5)
    assert run.history.leaves == []
