"""Who may import whom: each floor stands on the ones before it, and the core stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

import optax_structured

ROOT = pathlib.Path(optax_structured.__file__).parent

FLOORS = [
    {"checks", "trees"},
    {"regularizers"},
    {"proximal"},
    {"recipes"},
    {"diagnostics"},
    {"report", "training", "cli", "__main__"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
TOP = len(FLOORS) - 1

NUMERICS = {"jax", "numpy"}  # for everything up to the regularizers
CORE = NUMERICS | {"optax", "chex"}
EXTRAS = CORE | {"flax", "matplotlib", "orbax", "rich", "sklearn", "typer"}

MODULES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """`(name, at top level)` of everything a file imports; relative imports are not used."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


def wing(path):
    """The first name below the package: `recipes` of `recipes/proximal.py`."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_module_has_a_floor():
    assert {wing(path) for path in MODULES} - {"__init__"} <= LEVEL.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    here = wing(path)
    level = LEVEL.get(here, TOP)  # the package itself stands on all floors
    allowed = EXTRAS if level == TOP and here != "__init__" else CORE if level > 1 else NUMERICS
    for name, at_top in imports(path):
        parts = name.split(".")
        if parts[0] == "optax_structured":
            target = parts[1] if len(parts) > 1 and parts[1] in LEVEL else None
            if target is None:
                assert level == TOP, f"{path}: {name} is all floors at once"
            elif here == "__init__":
                assert LEVEL[target] < TOP, f"{path}: {name} needs the extras"
            else:
                below = LEVEL[target] < level
                assert below or target == here or level == LEVEL[target] == TOP, f"{path}: {name}"
            continue
        if parts[0] in sys.stdlib_module_names:
            continue
        assert parts[0] in allowed, f"{path}: {name}"
        assert "_src" not in parts, f"{path}: {name} is private"
        if here in ("cli", "__main__") and parts[0] in EXTRAS - CORE - {"typer", "rich"}:
            assert not at_top, f"{path}: import {name} where it is used"


def test_importing_the_package_imports_no_extras():
    heavy = sorted(EXTRAS - CORE)
    code = f"import sys, optax_structured; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
