"""Several processes on loopback: the numbers of one, and what is left when one of them dies."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from cli_runs import LM, invoke, write_text
from processes import host_devices

HERE = pathlib.Path(__file__).parent
MESH = {"data": 4, "fsdp": 2}
RECIPES = ["galore", "ramda", "adamw-8bit"]
# Sums over devices add up in another order; an 8-bit code may fall to either side.
CLOSE = {"galore": 1e-4, "ramda": 1e-4, "adamw-8bit": 5e-3}
pytestmark = pytest.mark.slow


def start(command, processes, devices):
    """Processes of a run, that know of each other if there are several."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    base = {
        **os.environ,
        **host_devices(devices),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    together = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=base | (together | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that it can be ended with all that it started
        )
        for i in range(processes)
    ]


def finish(run):
    """What each process printed; none is left behind, whichever fails."""
    try:
        said = [process.communicate(timeout=600) for process in run]
    finally:
        end(run)
    for process, (_, errors) in zip(run, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


def end(run):
    """Kills what still runs, with all that it started."""
    for process in run:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def arrays(file):
    with np.load(file) as stored:
        return dict(stored)


def worker(folder, processes, devices, out, mesh=MESH, recipes=RECIPES, **more):
    asked = {"mesh": mesh, "recipes": recipes, "folder": str(folder), "out": str(out), **more}
    return start([HERE / "worker.py", json.dumps(asked)], processes, devices)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The run of two processes with four devices each, and its checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    finish(worker(folder / "run", 2, 4, folder / "two.npz"))
    return folder / "run", arrays(folder / "two.npz")


def test_a_run_that_hangs_leaves_nothing_behind(monkeypatch):
    """Neither its processes nor what those started."""
    hang = "import subprocess, sys, time; x = subprocess.Popen([sys.executable, '-c', 'import time;"
    hang += " time.sleep(600)']); print(x.pid, flush=True); x.wait()"
    run = start(["-c", hang], 1, 1)
    child = int(run[0].stdout.readline())
    wait = subprocess.Popen.communicate
    monkeypatch.setattr(
        subprocess.Popen, "communicate", lambda p, timeout=None: wait(p, None, timeout and 0.1)
    )
    with pytest.raises(subprocess.TimeoutExpired):
        finish(run)
    assert run[0].returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60  # a killed process ends when it is next scheduled
    while not is_gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(child)


def is_gone(process):
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def params(ended, recipe):
    return {k: x for k, x in ended.items() if k.startswith(f"{recipe}/ended.params")}


@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 2)])
def test_any_number_of_processes_gets_the_same_numbers(together, processes, devices, tmp_path):
    finish(worker(tmp_path / "run", processes, devices, tmp_path / "other.npz"))
    other = arrays(tmp_path / "other.npz")
    for recipe in RECIPES:
        for name, x in params(together[1], recipe).items():
            np.testing.assert_allclose(other[name], x, rtol=0, atol=CLOSE[recipe], err_msg=name)


def test_a_killed_process_and_all_start_again(together, tmp_path):
    """From the last checkpoint, to the bits that a run without a break ends with."""
    asked = (tmp_path / "run", 2, 4, tmp_path / "again.npz")
    run = worker(*asked, recipes=["adamw-8bit"], die_after=1)
    try:
        assert run[1].wait(timeout=600) == -signal.SIGKILL
    finally:
        end(run)
    finish(worker(*asked, recipes=["adamw-8bit"], resume=True))
    again = arrays(tmp_path / "again.npz")
    for name in again:
        if "/ended" in name:
            np.testing.assert_array_equal(again[name], together[1][name], err_msg=name)


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2}, {}], ids=["2x2", "one device"])
def test_a_checkpoint_opens_on_other_devices(together, mesh, tmp_path):
    """Eight devices in two processes saved it."""
    folder, saved = together
    asked = {"mesh": mesh, "recipes": ["galore", "adamw-8bit"], "resume": True}
    finish(worker(folder, 1, 4 if mesh else 1, tmp_path / "one.npz", **asked))
    one = arrays(tmp_path / "one.npz")
    for name in one:
        np.testing.assert_array_equal(one[name], saved[name.replace("/began", "/ended")], name)


def test_the_command_in_two_processes(tmp_path):
    """One progress line, one folder; and it goes on elsewhere."""
    text = write_text(tmp_path / "short.txt")
    options = [*LM, "--batch-size", 8, "--recipe", "galore", "--rank", 4, "--text", text]
    command = ["-m", "optax_structured", "train", *options, "--out", tmp_path / "run"]
    mesh = ["--mesh", "data=4,fsdp=2"]
    first, second = finish(start([*command, *mesh, "--distributed", "--stop-after", 8], 2, 4))
    assert "galore 0" in first and "Written to" in first
    assert "galore" not in second and "Written to" not in second
    assert len(np.load(tmp_path / "run" / "losses.npy")) == 8
    code, said = invoke("train", "--resume", tmp_path / "run")
    assert code == 0, said
    assert len(np.load(tmp_path / "run" / "losses.npy")) == 12
