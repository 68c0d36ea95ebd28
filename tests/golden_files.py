"""Reads the golden trajectories: what the published code does on fixed inputs.

Layouts are torch's, a linear weight is (out, in) and a convolution (out, in, kh, kw). Regularizers
are told by axes, so the axes are translated (one group per input is `group_axis=1`), never numbers.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class Golden:
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return self.meta["hyperparameters"]

    @property
    def start(self) -> dict[str, np.ndarray]:
        return self.leaves("params0")

    def leaves(self, key: str) -> dict[str, np.ndarray]:
        """`{leaf: array}` of the arrays stored as `key/leaf`; with a step axis where it has one."""
        prefix = key + "/"
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def steps(self, key: str) -> list[dict[str, np.ndarray]]:
        return [{k: v[t] for k, v in self.leaves(key).items()} for t in range(self.meta["steps"])]


@functools.cache
def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Golden(json.loads(str(arrays.pop("meta"))), arrays)
