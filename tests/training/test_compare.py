"""The table of a comparison, and the clock behind it."""

import pytest
from training_small import images, lm

from optax_structured.training import compare
from optax_structured.training.task import Column


def test_ends_are_means_with_standard_errors():
    runs = [[{"x": 9.0}, {"x": x}] for x in (4.0, 5.0, 6.0)]
    assert Column("heading", "x", percent=False).ends(runs) == "5.000 ± 0.577"
    assert Column("heading", "x", percent=False).ends(runs[:1]) == "4.000"
    assert Column("heading", "x", percent=True).ends([[{"x": 0.5}]]) == "50.00 %"
    assert Column("heading", "x", percent=False).ends([*runs, []]) == "diverged"


def test_every_recipe_has_as_many_learning_rates():
    compare.check_budget({"adamw": (1e-3, 1e-2), "galore": (1e-2, 1e-1)})
    with pytest.raises(ValueError, match="got adamw 2, galore 1"):
        compare.check_budget({"adamw": (1e-3, 1e-2), "galore": (1e-2, 1e-2)})
    with pytest.raises(ValueError, match="at least one"):
        compare.check_budget({"adamw": ()})


def test_a_run_that_diverged_is_the_worst():
    assert compare.score(lm(), []) > compare.score(lm(), [{"perplexity": 1e9}])
    assert compare.score(images(), [{"error": 0.5}]) > compare.score(images(), [{"error": 0.1}])


def test_paces_are_measured_in_turn():
    found = compare.step_ms({"one": lm(), "two": lm()})
    assert found.keys() == {"one", "two"} and min(found.values()) > 0
