"""Who may import whom: each floor stands on the ones before it, and the core stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

import optax_structured

ROOT = pathlib.Path(optax_structured.__file__).parent

FLOORS = [
    {"trees"},
    {"meshes", "states"},
    {"xla"},
    {"regularizers", "projectors", "curvature", "step_sizes"},
    {"transforms"},
    {"quantization"},
    {"proximal", "low_rank", "weights"},
    {"recipes", "presets", "adapters", "compact"},
    {"diagnostics", "memory"},
    {"contrib"},  # beside the optimizers: nothing imports it
    {"planning", "training", "cli", "__main__"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
TOP = len(FLOORS) - 1

# Rooms, and modules of other rooms, that never import optax.
NUMERICS = {"trees", "xla", "meshes", "regularizers", "projectors", "curvature"}

# Beside numerics that they use, elements: they do.
ELEMENTS = {"mfac", "dual_gauss_newton", "smoothness", "modules", "masking"}
ELEMENTS = {f"curvature/{name}.py" for name in ELEMENTS}

ARRAYS = {"jax", "numpy"}
CORE = ARRAYS | {"optax", "chex"}
EXTRAS = CORE | {"flax", "matplotlib", "orbax", "rich", "sklearn", "typer"}
EXTRAS |= {"safetensors", "tokenizers"}
# Models of other libraries, their files and pictures, imported where they are used.
LIBRARIES = {"equinox", "flax", "haiku", "matplotlib", "safetensors"}

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


def wing(parts):
    """The wing of a dotted name below the package: the longest that has a floor, or None."""
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LEVEL), None)


def wing_of(path):
    """`recipes` of `recipes/galore.py`; None of the package itself, which stands on all floors."""
    return wing(path.relative_to(ROOT).with_suffix("").parts)


def test_every_module_has_a_floor():
    assert [path for path in MODULES if wing_of(path) is None] == [ROOT / "__init__.py"]


def test_wings_are_found_by_the_longest_name():
    assert wing(("projectors", "base", "Projector")) == "projectors"
    assert wing(("low_rank", "wrapper")) == "low_rank"
    assert wing(("Axes",)) is None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    here = wing_of(path)
    level = LEVEL.get(here, TOP)
    numerics = here in NUMERICS and str(path.relative_to(ROOT)) not in ELEMENTS
    allowed = EXTRAS if level == TOP and here else ARRAYS if numerics else CORE
    for name, at_top in imports(path):
        first, *parts = name.split(".")
        if first == "optax_structured":
            target = wing(parts)
            if target is None:
                assert level == TOP, f"{path}: {name} is all floors at once"
                assert not parts or hasattr(optax_structured, parts[0]), f"{path}: no {name}"
            elif here is None:
                assert LEVEL[target] < TOP, f"{path}: {name} needs the extras"
            else:
                below = LEVEL[target] < level
                assert below or target == here or level == LEVEL[target] == TOP, f"{path}: {name}"
            continue
        if first in sys.stdlib_module_names:
            continue
        if here in ("presets", "adapters", "compact") and first in LIBRARIES:
            assert not at_top, f"{path}: import {name} where it is used"
            continue
        assert first in allowed, f"{path}: {name}"
        assert "_src" not in parts, f"{path}: {name} is private"
        if here in ("cli", "__main__") and first in EXTRAS - CORE - {"typer", "rich"}:
            assert not at_top, f"{path}: import {name} where it is used"


def classes_by_wing():
    """`{name of a class: wings that define one}`."""
    found = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(wing_of(path))
    return found


CLASSES = classes_by_wing()


def strings(tree):
    """All strings that are code: neither docstrings nor entries of `__all__`."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            prose.update(map(id, ast.walk(node.value)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def named_above(path, text):
    """The classes of floors above that of a file which the strings of `text` name."""
    here = wing_of(path)
    level = LEVEL.get(here, TOP)
    for string in strings(ast.parse(text)):
        for name in string.rsplit(".", 1)[-1:]:
            wings = CLASSES.get(name, ())
            if wings and all(LEVEL.get(w, TOP) >= level and w != here for w in wings):
                yield string


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_strings_name_no_class_of_a_floor_above(path):
    if wing_of(path) is None or LEVEL[wing_of(path)] == TOP:
        return
    assert not [*named_above(path, path.read_text())]


def test_a_class_in_a_string_is_seen():
    text = "OWNERS = {'low_rank.LowRankState': 1, 'ScaleByAdamState': 2}"
    assert [*named_above(ROOT / "states" / "x.py", text)] == ["low_rank.LowRankState"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_contrib(path):
    names = [name for name, _ in imports(path) if name.startswith("optax_structured.contrib")]
    assert not names or wing_of(path) == "contrib"


def test_importing_the_package_does_not_load_contrib():
    code = "import sys, optax_structured; print('optax_structured.contrib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["optax_structured", "optax_structured.planning"])
def test_importing_it_loads_no_extras(module):
    heavy = sorted({*(EXTRAS | LIBRARIES) - CORE, "jax.extend", "jax._src.pallas"})
    code = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
