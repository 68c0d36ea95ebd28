"""The pages and the notebook run as they are printed."""

import os
import pathlib
import re
import sys
import textwrap

import nbformat
import pytest
from nbclient import NotebookClient

from optax_structured.training import comparison

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]+")


def name(path):
    return path.relative_to(ROOT).as_posix()


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    [PAGES[0], *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES[1:])],
    ids=name,
)
def test_every_python_block_runs_by_itself(page):
    """In the README, alone; in another page, in a copy of what its first block leaves."""
    text = page.read_text()
    first: dict | None = None
    for block in BLOCK.finditer(text):
        # Lines of the page, so that a traceback points into it.
        start = "\n" * (text[: block.start()].count("\n") + 1)
        code = compile(start + textwrap.dedent(block[2]), str(page), "exec")
        namespace = {"__name__": "__main__"} if first is None else dict(first)
        exec(code, namespace)
        if page != PAGES[0] and first is None:
            first = namespace


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_gradients_are_gradients(page):
    assert not re.search(r"update\((params|weights|factored),", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}#{anchor}"


def test_the_gallery_shows_every_notebook():
    page = (ROOT / "docs" / "gallery.md").read_text()
    for path in NOTEBOOKS:
        shown = f"](images/gallery_{path.stem}.png)](../notebooks/{path.name})"
        assert shown in page, path.stem


def test_the_tests_that_troubleshooting_names_exist():
    page = (ROOT / "docs" / "troubleshoot.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 25
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), (file, test)


def test_the_tables_of_choose_are_those_of_its_comparisons():
    page = (ROOT / "docs" / "choose.md").read_text()
    for path in (ROOT / "docs" / "comparisons").glob("*/comparison.json"):
        table, _, _ = comparison.load(path).table().partition("\n\n")
        assert table in page, path
        assert f"](comparisons/{path.parent.name}/frontier.png)" in page


def outputs(notebook):
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def text_of(output):
    """All that a stored output says, but for its pictures."""
    data = {kind: x for kind, x in output.get("data", {}).items() if not kind.startswith("image/")}
    return f"{output.get('text', '')} {data} {output.get('traceback', '')}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_stored_outputs_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not ABSOLUTE_PATH.search(text_of(output)), text_of(output)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter are not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    kernel = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute(env=kernel)
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
