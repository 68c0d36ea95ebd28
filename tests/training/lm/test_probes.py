"""The diagnostics of a run: asked at every evaluation, one row a low-rank leaf."""

from training_lm_small import experiment

from optax_structured.training.lm import loop, plots

LEAVES = 7  # attention and MLP of one layer


def test_every_evaluation_has_a_row_a_leaf(tmp_path):
    run = loop.train(experiment("fira"), tmp_path)
    assert [row["step"] for row in run.leaves] == [5] * LEAVES + [10] * LEAVES + [12] * LEAVES
    for row in run.leaves:
        assert 0 < row["captured_energy"] < 1 and 1 <= row["effective_rank"] <= 4
        assert 0 < row["subspace_overlap"] < 1.001 and row["limiter_activity"] in (0, 1)
    again = loop.train(experiment("fira"), tmp_path, resume=True)
    assert again.leaves == run.leaves
    plots.draw_leaves(run.leaves, "title", tmp_path)
    assert (tmp_path / plots.LEAVES).exists()


def test_a_recipe_without_a_limiter_has_no_such_column(tmp_path):
    run = loop.train(experiment("galore"), tmp_path, stop_after=5)
    assert run.leaves[0].keys() >= {"captured_energy", "subspace_overlap"}
    assert "limiter_activity" not in run.leaves[0]


def test_full_rank_has_none(tmp_path):
    run = loop.train(experiment("adamw"), tmp_path, stop_after=5)
    assert run.leaves == []
    plots.draw_leaves(run.leaves, "title", tmp_path)
    assert not (tmp_path / plots.LEAVES).exists()
