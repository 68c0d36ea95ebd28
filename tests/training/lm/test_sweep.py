"""The table of a comparison, and the clock behind it."""

import pytest
from training_lm_small import experiment

from optax_structured import report
from optax_structured.training.lm import sweep


def test_perplexities_are_means_with_standard_errors():
    line = report.RecipeLine("galore", [4.0, 5.0, 6.0], 1e-2, False, 1234, 5.04, 1.5, "rank 4")
    alone = line._replace(name="adamw", perplexities=[3.0], at_edge=True, ratio=None)
    *_, first, second = report.perplexity_markdown([line, alone]).splitlines()
    assert first == "| galore | 5.000 ± 0.577 | 0.01 | 1,234 | 5.0 | 1.50 | rank 4 |"
    assert second == "| adamw | 3.000 | 0.01 (edge) | 1,234 | 5.0 |  | rank 4 |"


def test_every_recipe_has_as_many_learning_rates():
    sweep.check_budget({"adamw": (1e-3, 1e-2), "galore": (1e-2, 1e-1)})
    with pytest.raises(ValueError, match="got adamw 2, galore 1"):
        sweep.check_budget({"adamw": (1e-3, 1e-2), "galore": (1e-2, 1e-2)})
    with pytest.raises(ValueError, match="at least one"):
        sweep.check_budget({"adamw": ()})


def test_a_run_that_diverged_is_the_worst():
    assert sweep.perplexity([]) > sweep.perplexity([{"perplexity": 1e9}])


def test_paces_are_measured_in_turn():
    found = sweep.step_ms({"one": experiment(), "two": experiment()})
    assert found.keys() == {"one", "two"} and min(found.values()) > 0
