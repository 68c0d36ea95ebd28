"""One version, wherever it is written."""

import pathlib
import re
import tomllib

import optax_structured as oxs

ROOT = pathlib.Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    (latest,) = re.findall(r"^## (\S+) \(", (ROOT / "docs" / "changelog.md").read_text(), re.M)[:1]
    assert oxs.__version__ == project["version"] == cited == latest
