"""The page of all systems: made from the registry of recipes and `docs/systems.toml`.

After a change that is meant: `python tests/test_systems.py`.
"""

import pathlib
import tomllib

import pytest

import optax_structured as oxs
from optax_structured import contrib
from optax_structured.recipes.registry import RECIPES

ROOT = pathlib.Path(__file__).parents[1]
TABLE, PAGE = ROOT / "docs" / "systems.toml", ROOT / "docs" / "systems.md"
ROOMS = tomllib.loads(TABLE.read_text())["room"]
SYSTEMS = {system["name"]: system for room in ROOMS for system in room["system"]}
FIELDS = {"name", "paper", "purpose", "where", "test", "goldens", "claim"}
HEAD = "| system | what for | where | test | runs of others | shown, and not claimed |\n"
HEAD += "|---|---|---|---|---|---|"


def row(system):
    where = ", ".join(f"`{name}`" for name in system["where"])
    cells = [f"[{system['name']}]({system['paper']})", system["purpose"], where]
    runs = ", ".join(f"`{prefix}*`" for prefix in system["goldens"]) or "none"
    cells += [f"`{system['test']}`", runs, system["claim"]]
    return f"| {' | '.join(cells)} |"


def current():
    lines = [
        "# Systems",
        "",
        "Made from `docs/systems.toml` and the registry of recipes by `tests/test_systems.py`, and",
        "checked against the code in CI. Names are below `optax_structured`. Runs of others: files",
        "in `tests/golden`, what the authors' code, or a reference of the equations, does on fixed",
        "inputs, replayed step by step. What a row does not say is not claimed; published tables",
        "are compared with only on the pages that say so.",
        "",
        "## Recipes",
        "",
        "Each is tested in `tests/contracts` under jit, vmap, sharding, checkpoints, schedules and",
        "half precision; scalars and state are in [recipes](recipes.md).",
        "",
        "| recipe | what for | family |",
        "|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        family = recipe.family.replace("_", " ")
        lines.append(f"| [`{name}`]({recipe.paper}) | {recipe.purpose} | {family} |")
    for room in ROOMS:
        lines += ["", f"## {room['title']}", "", HEAD, *map(row, room["system"])]
    return "\n".join(lines) + "\n"


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text() == current(), "see the docstring of this file"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_row_is_true(name):
    """What it names exists: functions, tests that name them, golden files."""
    system = SYSTEMS[name]
    assert system.keys() == FIELDS and system["where"] and system["claim"]
    text = "".join(path.read_text() for path in ROOT.glob(system["test"]))
    assert text, system["test"]
    for where in system["where"]:
        thing = contrib if where.startswith("contrib.") else oxs
        for part in where.removeprefix("contrib.").split("."):
            thing = getattr(thing, part)
        assert thing.__doc__
    for prefix in system["goldens"]:
        assert list((ROOT / "tests" / "golden").glob(f"{prefix}*.npz")), prefix


def test_every_method_of_contrib_has_a_row():
    """By module: a file holds one."""
    covered = set()
    for system in SYSTEMS.values():
        for where in system["where"]:
            if where.startswith("contrib."):
                _, room, *rest = where.split(".")
                thing = getattr(getattr(contrib, room), rest[-1])
                covered.add(thing.__module__)
    helpers = {"base", "linear_head", "projections", "spectral", "stragglers", "boosting_losses"}
    for room in contrib.__all__:
        module = getattr(contrib, room)
        for name in module.__all__:
            home = getattr(module, name).__module__
            assert home in covered or home.rpartition(".")[2] in helpers, f"{room}.{name}"


if __name__ == "__main__":
    PAGE.write_text(current())
