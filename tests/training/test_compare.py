"""The table of a comparison, and the clock behind it."""

import pytest
from training_small import images, lm

from optax_structured.training import compare, frontier
from optax_structured.training.comparison import Comparison, Entry, load
from optax_structured.training.task import Column, Cost


def test_ends_are_means_with_standard_errors():
    values = [4.0, 5.0, 6.0]
    assert Column("heading", "x", percent=False).ends(values) == "5.000 ± 0.577"
    assert Column("heading", "x", percent=False).ends(values[:1]) == "4.000"
    assert Column("heading", "x", percent=True).ends([0.5]) == "50.00 %"
    assert Column("heading", "x", percent=False).ends([]) == "diverged"


def entry(score, zeros, ms, **given):
    ends = {} if score is None else {"error": [score, score], "zeros": [zeros, zeros]}
    swept = {"0.1": score, "1": None}
    fields = {"recipe": "ramda", "family": "proximal", "settings": "strength 1", "swept": swept}
    fields |= {
        "in_turn": True,
        "learning_rate": 0.1,
        "ends": ends,
        "state_bytes": 8,
        "step_ms": [ms, ms, 2 * ms],
    }
    return Entry(**{**fields, **given})


FOUND = Comparison(
    "a network on data",
    "title",
    [Column("test error", "error", percent=True)],
    [
        Cost("zeros", "zeros", "zeros", percent=True, more_is_better=True),
        Cost("step_ms", "ms", "ms"),
    ],
    {
        "adamw": entry(0.1, 0.0, 1.0),
        "ramda@1": entry(0.1, 0.5, 2.0),
        "ramda@2": entry(0.3, 0.9, 2.0),
        "rmda": entry(0.4, 0.8, 1.0),
        "prox_sgd": entry(None, 0.0, 1.0),
    },
)


def test_the_frontier_is_what_no_other_beats_in_both():
    zeros, ms = FOUND.costs
    assert FOUND.frontier(zeros) == ["ramda@2", "ramda@1"]
    assert FOUND.frontier(ms) == ["adamw"]
    assert FOUND.entries["adamw"].of("step_ms") == (1.0, 0.0, 1.0)


def test_times_that_were_not_measured_in_turn_are_not_compared():
    late = FOUND._replace(entries={**FOUND.entries, "late": entry(0.1, 0.0, 9.0, in_turn=False)})
    assert [cost.name for cost in late.fair_costs] == ["zeros"]
    assert "2.00" not in late.table()


def test_a_comparison_is_kept_as_json_and_drawn_from_it(tmp_path):
    FOUND.save(tmp_path)
    assert load(tmp_path) == load(tmp_path / "comparison.json") == FOUND
    rows = load(tmp_path).table().splitlines()
    assert rows[3].split(" | ")[5:] == ["2.00", "zeros", "strength 1 |"]
    assert "diverged | 0.1 (edge)" in rows[6]
    frontier.draw(FOUND, tmp_path)
    assert (tmp_path / frontier.PICTURE).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the comparison.json of a comparison"):
        load(tmp_path)


def test_every_recipe_has_as_many_learning_rates():
    compare.check_budget({"adamw": (1e-3, 1e-2), "galore": (1e-2, 1e-1)})
    with pytest.raises(ValueError, match="got adamw 2, galore 1"):
        compare.check_budget({"adamw": (1e-3, 1e-2), "galore": (1e-2, 1e-2)})
    with pytest.raises(ValueError, match="at least one"):
        compare.check_budget({"adamw": ()})


def test_a_run_that_diverged_is_the_worst():
    assert compare.score(lm(), []) > compare.score(lm(), [{"perplexity": 1e9}])
    assert compare.score(images(), [{"error": 0.5}]) > compare.score(images(), [{"error": 0.1}])


def test_among_rates_that_the_test_images_do_not_tell_apart_the_one_of_most_zeros_is_best():
    task = images()
    n = len(task.images.test)
    (zeros, *_), (error, *_) = task.costs, task.panels[0].lines
    runs = {1.0: (10 / n, 0.1), 2.0: (12 / n, 0.6), 3.0: (12 / n, 0.5), 4.0: (20 / n, 0.9)}
    of_rate = {rate: [{error: e, zeros.name: z}] for rate, (e, z) in runs.items()} | {5.0: []}
    assert compare.best_rate(task, of_rate) == 2.0
    assert compare.best_rate(lm(), {1.0: [{"perplexity": 3}], 2.0: [{"perplexity": 2}]}) == 2.0
    assert compare.best_rate(task, {1.0: [], 2.0: []}) == 1.0


def test_paces_are_measured_in_turn():
    found = compare.step_ms({"one": lm(), "two": lm()})
    assert found.keys() == {"one", "two"}
    assert all(0 < low <= median <= high for low, median, high in found.values())
