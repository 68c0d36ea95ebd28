"""The site, with a reference made from the docstrings: `sphinx-build -W -c docs . site`."""

import importlib
import inspect
import pathlib
import sys

import optax_structured as oxs

project = "optax_structured"
author = "the optax_structured developers"
version = release = oxs.__version__

sys.path.append(str(pathlib.Path(__file__).parent))
extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["root"]  # index.html leads to docs/index.html
html_title = project
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_fence_as_directive = ["math"]
default_role = "py:obj"
nb_execution_mode = "off"  # the notebooks hold their output, and the tests run them
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["State", "Equals"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
suppress_warnings = ["mystnb.unknown_mime_type"]

# What people look for, in this order: a page each, of all public names of a room.
ROOMS = {
    "Recipes": "recipes",
    "Regularizers": "regularizers",
    "Elements and solvers of proximal chains": "proximal",
    "Low-rank projection": "low_rank",
    "Projectors": "projectors",
    "Small elements": "transforms",
    "Step sizes": "step_sizes",
    "Curvature": "curvature",
    "State in codes": "quantization",
    "Weights in another form": "weights",
    "Adapters": "adapters",
    "Which leaf gets what": "trees",
    "Rules for modules": "presets",
    "What a run shows": "diagnostics",
    "Bytes": "memory",
    "Shardings": "meshes",
    "What an array of state is": "states",
}


def _entry(room: str, name: str) -> str:
    """The directive that documents a name, under the shortest path that it has."""
    thing = getattr(importlib.import_module(f"optax_structured.{room}"), name)
    flat = getattr(oxs, name, None) is thing
    path = f"optax_structured.{name}" if flat else f"optax_structured.{room}.{name}"
    if inspect.isclass(thing):
        return f".. autoclass:: {path}\n   :members:\n"
    if inspect.isroutine(thing):
        return f".. autofunction:: {path}\n"
    return f".. py:data:: {path}\n\n   A {type(thing).__name__}.\n"


def write_reference(app) -> None:
    """One page a room."""
    folder = pathlib.Path(app.srcdir) / "docs" / "api"
    folder.mkdir(exist_ok=True)
    contrib = importlib.import_module("optax_structured.contrib")
    rooms = ROOMS | {f"Contrib: {n.replace('_', ' ')}": f"contrib.{n}" for n in contrib.__all__}
    seen = set()
    for title, room in rooms.items():
        module = importlib.import_module(f"optax_structured.{room}")
        things = {n: getattr(module, n) for n in sorted(module.__all__, key=str.lower)}
        names = [name for name, thing in things.items() if id(thing) not in seen]
        seen |= set(map(id, things.values()))
        body = "\n".join(_entry(room, name) for name in names)
        page = f"{title}\n{'=' * len(title)}\n\n{inspect.getdoc(module)}\n\n{body}"
        (folder / f"{room}.rst").write_text(page)
    flat = {n: x for n in oxs.__all__ if not inspect.ismodule(x := getattr(oxs, n))}
    missing = [name for name, thing in flat.items() if id(thing) not in seen]
    if missing:
        raise RuntimeError(f"no page of the reference has {', '.join(missing)}")
    entries = "\n".join(f"   {room}" for room in rooms.values())
    index = f"Reference\n=========\n\n.. toctree::\n   :maxdepth: 1\n\n{entries}\n"
    (folder / "index.rst").write_text(index)


def setup(app) -> None:
    app.connect("builder-inited", write_reference)
