"""What a recipe needs: no low-rank recipe loads the proximal side, nor the reverse."""

import ast
import pathlib

import pytest

import optax_structured

ROOT = pathlib.Path(optax_structured.__file__).parent
PROXIMAL = {"proximal", "regularizers"}
LOW_RANK = {"low_rank", "projectors", "weights"}


def file_of(name):
    """The file of a module, or of the module that a name is in; None outside of the package."""
    parts = name.split(".")
    if parts[0] != ROOT.name:
        return None
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[1:end])
        if path.with_suffix(".py").exists():
            return path.with_suffix(".py")
        if end > 1 and (path / "__init__.py").exists():
            return path / "__init__.py"
    return None


def closure(path):
    """The rooms of all modules that a file imports, by their own imports."""
    seen, pending = set(), [path]
    while pending:
        path = pending.pop()
        if path is None or path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                pending += [file_of(f"{node.module}.{alias.name}") for alias in node.names]
    return {path.relative_to(ROOT).parts[0] for path in seen}


@pytest.mark.parametrize(
    "recipe", ["galore", "fira", "dct", "ldadam", "q_galore", "grad_norm_lorp"]
)
def test_low_rank_recipes_import_nothing_proximal(recipe):
    rooms = closure(ROOT / "recipes" / f"{recipe}.py")
    assert "low_rank" in rooms
    assert not rooms & PROXIMAL


@pytest.mark.parametrize("recipe", ["dual_averaging", "madgrad", "prox_adam", "prox_sgd"])
def test_proximal_recipes_import_nothing_of_low_rank(recipe):
    rooms = closure(ROOT / "recipes" / f"{recipe}.py")
    assert rooms & {"proximal", "transforms"}
    assert not rooms & LOW_RANK
