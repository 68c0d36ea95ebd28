"""The registry has every recipe, and its page is up to date.

`PYTHONPATH=.:tests python tests/recipes/test_registry.py` writes the page.
"""

import inspect
import pathlib

import pytest
from recipes_table import CASES

from optax_structured import recipes
from optax_structured.recipes.registry import RECIPES, SCALARS, Recipe
from optax_structured.recipes.state_numbers import Matrix

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "recipes.md"
FAMILIES = {
    "plain": "Without structure",
    "proximal": "Exact structure",
    "low_rank": "Memory of low rank",
}
MATRIX = Matrix(size=1024, length=4096, rank=128, rows=4096)


def state(recipe: Recipe) -> str:
    """Of the matrix, over what AdamW keeps."""
    return f"{sum(recipe.numbers(MATRIX)) / (2 * MATRIX.entries):.3f}" if recipe.numbers else ""


def page() -> str:
    rank, size, length = MATRIX.rank, MATRIX.size, MATRIX.length
    lines = [
        "# Recipes",
        "",
        "Made from `optax_structured/recipes/registry.py` by `tests/recipes/test_registry.py`.",
        "Scalars take a number or a schedule. State: numbers for a matrix of",
        f"{size} × {length} at rank {rank} by the published formula, over AdamW's. How to choose:",
        "[proximal](proximal.md), [low rank](low_rank.md).",
    ]
    for family, title in FAMILIES.items():
        lines += ["", f"## {title}", ""]
        lines += ["| recipe | take it for | scalars | state |", "|---|---|---|---|"]
        for name, recipe in RECIPES.items():
            if recipe.family == family:
                scalars = ", ".join(f"`{scalar}`" for scalar in recipe.scalars)
                named = f"[`{name}`]({recipe.paper})"
                lines.append(f"| {named} | {recipe.purpose} | {scalars} | {state(recipe)} |")
    return "\n".join(lines) + "\n"


def test_every_public_recipe_has_an_entry():
    named = {name: recipe.make for name, recipe in RECIPES.items() if name != "adamw"}
    public = set(recipes.__all__) - {"check_nothing_follows"}
    assert named == {name: getattr(recipes, name) for name in public}


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"adamw"}))
def test_every_argument_that_takes_a_schedule_is_a_scalar_of_the_registry(name):
    """Of the annotation, which is one union for all of them."""
    parameters = inspect.signature(RECIPES[name].make).parameters
    driven = {n for n, p in parameters.items() if "float" in str(p.annotation)}
    assert driven == RECIPES[name].scalars.keys()


def test_every_recipe_has_a_line_in_the_contract_table():
    covered = {case.make for case in CASES}
    assert covered >= {r.make for name, r in RECIPES.items() if name != "adamw"}
    assert {scalar for case in CASES for scalar in case.scalars} >= SCALARS.keys()


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
