"""Ctrl-C, in real processes."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cli_runs import IMAGES, LM

TESTS = pathlib.Path(__file__).parents[1]
PATIENCE = 300  # seconds, for a process that hangs
# The command, saving after every compiled call, so that a test sees that steps were made.
COMMAND = """
import sys
from optax_structured.cli import app
from optax_structured.training import loop
loop._SECONDS_BETWEEN_SAVES = 0.0
app(sys.argv[1:])
"""
STUCK = """
import time
from optax_structured.training.interrupts import Interrupts
with Interrupts(lambda: print("one", flush=True), lambda: print("two", flush=True)) as stopped:
    print("ready", flush=True)
    while True:
        time.sleep(600)
"""


def start(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def saved_step(run):
    steps = [path.name for path in run.glob("checkpoints/*") if path.name.isdecimal()]
    return max(map(int, steps), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[*IMAGES, "--epochs", "100000"], [*LM, "--recipe", "adamw", "--steps", "1000000"]]
)
def test_the_first_saves_and_leaves_at_the_current_step(options, tmp_path):
    run = tmp_path / "my run"
    process = start(COMMAND, "train", *options, "--out", run)
    deadline = time.monotonic() + PATIENCE
    while saved_step(run) == 0:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    step, total = map(int, re.search(r"Saved at step (\d+) of (\d+)", said).groups())
    assert 0 < step == saved_step(run) == len(np.load(run / "losses.npy")) < total
    assert f"optax-structured train --resume '{run}'" in said and "Traceback" not in said
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) <= step
    assert json.loads((run / "config.json").read_text())["seed"] == 0


def test_the_second_leaves_at_once():
    process = start(STUCK)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "one\n"  # the main thread goes on with what it does
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (130, "two\n")
