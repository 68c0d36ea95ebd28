"""Each example runs as it stands, and ends as it says."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from processes import host_devices

FOLDER = pathlib.Path(__file__).parents[1] / "examples"


def output(path, **environment):
    command = [sys.executable, str(path)]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_runs(path):
    said = output(path)
    if "useless" in path.read_text():
        assert "inputs that are left: [0 1 2]" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stacked_layers.py", "maxtext_tree.py"])
def test_stacked_layers_train_on_eight_devices(name):
    said = output(FOLDER / name, **host_devices(8))
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", said).groups()
    assert float(last) < 0.1 * float(first)
