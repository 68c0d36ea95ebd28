"""One process of a run on a mesh: `python worker.py '{"recipes": [...], ...}'`, see test_processes.

Trains a tiny language model with each recipe, saves all, and writes the parameters of the first
process's view as they end.
"""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

import optax_structured as oxs
from optax_structured.training import devices
from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.lm import text
from optax_structured.training.lm.config import Config
from optax_structured.training.lm.task import LanguageModel
from optax_structured.training.names import PLAIN
from optax_structured.training.task import State

CALLS, STEPS = 3, 4  # of a run
SIZES = {"width": 64, "layers": 1, "heads": 2, "sequence": 16, "batch_size": 8}


class Ramda(LanguageModel):
    """What ends in exact zeros is no recipe of the job."""

    def optimizer(self, learning_rate):
        groups = oxs.rules((PLAIN, None), default=oxs.GroupLasso(group_axis=-2))
        return oxs.ramda(1e-2, groups, strength=1e-3)


RECIPES = {
    "galore": (LanguageModel, {"recipe": "galore", "rank": 8, "period": 5}),
    "ramda": (Ramda, {"recipe": "adamw"}),
    "adamw-8bit": (LanguageModel, {"recipe": "adamw", "state_bits": 8}),
}


def task_of(name, mesh):
    kind, given = RECIPES[name]
    whole = text.load()
    facts = {"text_sha256": whole.digest, "train_bytes": len(whole.train), "steps": CALLS * STEPS}
    return kind(Config(**SIZES, **given, **facts), whole, devices.Devices(mesh))


def train(name, mesh, folder, resume=False, die_after=None):
    """The state after all calls, whole; `die_after` calls this process is killed."""
    task = task_of(name, mesh)
    state, step = task.init(), 0
    with Checkpoints(pathlib.Path(folder) / name) as checkpoints:
        if resume:
            step, state = checkpoints.restore(state)
        restored = whole(state)
        for call in range(step // STEPS, CALLS):
            state, _ = task.steps(state, call * STEPS, STEPS)
            checkpoints.save((call + 1) * STEPS, state)
            if die_after == call + 1:
                os.kill(os.getpid(), signal.SIGKILL)
    return restored, whole(state)


def whole(state):
    return State(*jax.tree.map(np.asarray, multihost_utils.process_allgather(state, tiled=True)))


def save(path, states):
    arrays = {
        f"{name}/{when}{jax.tree_util.keystr(key)}": leaf
        for name, both in states.items()
        for when, state in zip(("began", "ended"), both, strict=True)
        for key, leaf in jax.tree.leaves_with_path(state)
    }
    np.savez(path, **arrays)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if "JAX_NUM_PROCESSES" in os.environ:
        devices.join()
    mine = asked.get("die_after") if jax.process_index() == 1 else None
    found = {
        name: train(name, asked["mesh"], asked["folder"], asked.get("resume", False), mine)
        for name in asked["recipes"]
    }
    if devices.is_first():
        save(asked["out"], found)
