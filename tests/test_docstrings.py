"""Every public name explains itself; the examples run as doctests of the package."""

import importlib
import inspect
import pkgutil
import re

import pytest
from test_public_api import namespaces

import optax_structured as oxs

PUBLIC = {name: getattr(oxs, name) for name in oxs.__all__}
for room, inside in namespaces().items():
    found = {f"{room}.{name}": getattr(inside, name) for name in inside.__all__}
    PUBLIC |= {name: x for name, x in found.items() if inspect.isroutine(x) or inspect.isclass(x)}
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
CLASSES = {name: c for name, c in PUBLIC.items() if inspect.isclass(c)}
STATES = {name: c for name, c in CLASSES.items() if issubclass(c, tuple)}
CONFIGS = {name: c for name, c in CLASSES.items() if name not in STATES}

# Protocols, bases and records that users meet but do not build.
NOT_BUILT_BY_USERS = {
    "adapters.Adapter",
    "adapters.Attached",
    "adapters.Codes",
    "adapters.FactorSolver",
    "adapters.Kernel",
    "adapters.Node",
    "adapters.Perturbation",
    "adapters.Spectrum",
    "compact.Compacted",
    "compact.Layer",
    "compact.Report",
    "compact.Stuck",
    "diagnostics.LayerRow",
    "low_rank.OneSided",
    "low_rank.Projector",
    "low_rank.Refresh",
    "low_rank.Residual",
    "low_rank.Transport",
    "memory.LeafMemory",
    "memory.MemoryReport",
    "presets.Kernel",
    "projectors.Frame",
    "projectors.OneSided",
    "projectors.Projector",
    "projectors.Refit",
    "proximal.Solver",
    "proximal.Subproblem",
    "quantization.Codec",
    "regularizers.Norm",
    "regularizers.Regularizer",
    "weights.Form",
    "weights.Weight",
}


def modules():
    for info in pkgutil.walk_packages(oxs.__path__, "optax_structured."):
        yield info.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_modules_say_what_they_are(name):
    if name.endswith("__main__"):
        pytest.skip("runs the program")
    module = importlib.import_module(name)
    assert module.__doc__
    assert module.__doc__.strip()


def explained(doc):
    """The arguments that a docstring explains, one a line or several together."""
    lines = re.findall(r"^ {2,4}(\w+(?:, \w+)*): ", doc, re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def first_line(thing):
    return inspect.getdoc(thing).splitlines()[0]


@pytest.mark.parametrize("name", PUBLIC)
def test_first_line_is_one_sentence(name):
    line = first_line(PUBLIC[name])
    assert 10 < len(line) <= 100
    assert line.endswith((".", ":", ")"))
    assert line[0].isupper() or line[0] in "`:0123456789"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    parameters = [
        p
        for p in inspect.signature(FUNCTIONS[name]).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if parameters:
        assert "Args:" in doc
    assert {parameter.name for parameter in parameters} <= explained(doc)
    assert "Returns:" in doc
    assert ">>> " in doc or "Example: see" in doc


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - NOT_BUILT_BY_USERS))
def test_classes(name):
    cls = CONFIGS[name]
    doc = inspect.getdoc(cls)
    parameters = list(inspect.signature(cls).parameters)
    if parameters:
        assert "Args:" in doc
    assert set(parameters) <= explained(doc)
    assert ">>> " in doc


@pytest.mark.parametrize("name", STATES)
def test_states_comment_on_each_field(name):
    source = inspect.getsource(STATES[name])
    for field in STATES[name]._fields:
        (line,) = (x for x in source.splitlines() if x.strip().startswith(f"{field}:"))
        assert "  # " in line, field


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - NOT_BUILT_BY_USERS))
def test_configs_are_frozen_hashable_and_not_callable(name):
    """So that `optax.inject_hyperparams` passes them on, and jit can close over them."""
    cls = CONFIGS[name]
    assert cls.__dataclass_params__.frozen
    assert cls.__hash__ is not None
    assert not hasattr(cls, "__call__") or "__call__" not in vars(cls)  # noqa: B004
