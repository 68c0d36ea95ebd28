"""`optax-structured report`: one file, with everything in it."""

import html.parser
import re
import shlex

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


@pytest.mark.slow
@pytest.mark.parametrize("options", [IMAGES, LM], ids=["images", "lm"])
def test_a_page_stands_alone_and_its_command_makes_the_same_run(options, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    assert invoke("train", *options, "--out", run)[0] == 0
    code, said = invoke("report", run)
    assert code == 0 and PAGE in said
    page = Reader((run / PAGE).read_text())
    assert len(page.sources) >= 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    (line,) = re.findall(r"optax-structured train .*", page.words)
    assert invoke(*shlex.split(line)[1:], "--out", again)[0] == 0
    assert stored_fields(again) == stored_fields(run)


def test_another_folder_is_a_sentence(tmp_path):
    code, said = invoke("report", tmp_path)
    assert code == 2
    assert "is not a run folder: it has no config.json" in said
