"""What was seen of a run, in memory and in its folder."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_structured.training.folder import Row, read_table, replacing, write_table

METRICS, LOSSES, LEAVES, STRIPS = "metrics.csv", "losses.npy", "leaves.csv", "strips.npz"


class Evaluation(NamedTuple):
    """What a task measures periodically."""

    row: Row  # for metrics.csv
    leaves: list[Row] = []  # a row per leaf, for leaves.csv
    strips: Mapping[str, Any] = {}  # an array per leaf, for strips.npz


@dataclasses.dataclass
class History:
    """A run so far."""

    rows: list[Row] = dataclasses.field(default_factory=list)  # one per evaluation
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    leaves: list[Row] = dataclasses.field(default_factory=list)  # one per evaluation and leaf
    strips: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)

    def add(self, evaluation: Evaluation) -> None:
        """One more evaluation."""
        self.rows.append(evaluation.row)
        self.leaves += evaluation.leaves
        for path, strip in evaluation.strips.items():
            self.strips.setdefault(path, []).append(np.asarray(strip))

    def mean_loss(self) -> float:
        """Of the steps since the last evaluation whose loss is finite; NaN if none is."""
        recent = self.losses[self.rows[-1]["step"] if self.rows else 0 :]
        recent = recent[np.isfinite(recent)]
        return float(recent.mean()) if recent.size else float("nan")

    def write(self, folder: pathlib.Path) -> None:
        """To the folder of the run."""
        with replacing(folder / LOSSES) as file:
            np.save(file, self.losses)
        for name, table in ((METRICS, self.rows), (LEAVES, self.leaves)):
            if table:
                write_table(folder / name, table)
        if self.strips:
            arrays: dict[str, Any] = {path: np.stack(x) for path, x in self.strips.items()}
            with replacing(folder / STRIPS) as file:
                np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, folder: pathlib.Path, step: int) -> "History":
        """What was seen up to this step; anything later is from after the checkpoint."""
        if not step:
            return cls()
        rows, leaves = (
            [row for row in _table(folder / name) if row["step"] <= step]
            for name in (METRICS, LEAVES)
        )
        strips: dict[str, list[np.ndarray]] = {}
        if (folder / STRIPS).exists():
            with np.load(folder / STRIPS) as arrays:
                strips = {path: list(arrays[path][: len(rows)]) for path in arrays.files}
        return cls(rows, np.load(folder / LOSSES)[:step], leaves, strips)


def evaluations(folder: pathlib.Path) -> list[Row]:
    """Those that a run, finished or not, has written."""
    return _table(folder / METRICS)


def _table(path: pathlib.Path) -> list[Row]:
    return read_table(path) if path.exists() else []
