"""`optax-structured report`: one file, with everything in it."""

import html.parser
import re
import shlex

import browser
import pytest
from cli_runs import IMAGES, LM, invoke

from optax_structured.training.folder import stored_fields
from optax_structured.training.page import PAGE


class Reader(html.parser.HTMLParser):
    """What a page loads, and its words."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module", params=[IMAGES, LM], ids=["images", "lm"])
def run(request, tmp_path_factory):
    """A run folder with its page."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    assert invoke("train", *request.param, "--out", folder)[0] == 0
    code, said = invoke("report", folder)
    assert code == 0 and PAGE in said
    return folder


@pytest.mark.slow
def test_a_page_stands_alone_and_its_command_makes_the_same_run(run, tmp_path):
    page = Reader((run / PAGE).read_text())
    assert len(page.sources) >= 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    (line,) = re.findall(r"optax-structured train .*", page.words)
    assert invoke(*shlex.split(line)[1:], "--out", tmp_path / "again")[0] == 0
    assert stored_fields(tmp_path / "again") == stored_fields(run)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it_without_a_server(run, tmp_path, width):
    found = browser.opened(run / PAGE, width, tmp_path)
    assert found["errors"] == [] and found["window"] == width
    assert found["content"] <= width
    assert len(found["pictures"]) >= 3
    for natural, shown, height in found["pictures"]:
        assert natural > 300 and height > 50 and 0.5 * min(width, natural) < shown <= width


def test_another_folder_is_a_sentence(tmp_path):
    code, said = invoke("report", tmp_path)
    assert code == 2
    assert "is not a run folder: it has no config.json" in said
