"""What a comparison found, recipe by recipe: a JSON file, a table, and who is on the frontier."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optax_structured.training.folder import replacing
from optax_structured.training.task import Column, Cost, mean_and_error

FILE = "comparison.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One recipe after its runs."""

    recipe: str
    family: str
    settings: str  # in words
    learning_rate: float  # the best of `swept`
    swept: Mapping[str, float | None]  # learning rate -> score on the first seed; None: diverged
    ends: Mapping[str, Sequence[float]]  # column -> at the end, a seed each; {}: one diverged
    state_bytes: int
    step_ms: Sequence[float]  # quartiles: as it trained, or, if `in_turn`, beside the others
    in_turn: bool = False

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the smallest or the largest."""
        rates = [float(rate) for rate in self.swept]
        return len(rates) > 1 and self.learning_rate in (min(rates), max(rates))

    def of(self, column: str) -> tuple[float, float, float]:
        """Mean and what is below and above it: a standard error over seeds, quartiles of a time."""
        if column == "step_ms":
            low, median, high = self.step_ms
            return median, median - low, high - median
        if column == "state_bytes":
            return self.state_bytes, 0.0, 0.0
        mean, error = mean_and_error(self.ends[column])
        return mean, error, error


class Comparison(NamedTuple):
    """Recipes in the order in which they ran."""

    about: str  # model, data and length, in words
    title: str
    judged: Sequence[Column]  # the first one is the score: the smaller the better
    costs: Sequence[Cost]
    entries: dict[str, Entry]  # by the name that a recipe has in the table

    def save(self, folder: pathlib.Path) -> None:
        """To `comparison.json`."""
        fields = {
            **self._asdict(),
            "judged": [column._asdict() for column in self.judged],
            "costs": [cost._asdict() for cost in self.costs],
            "entries": {name: dataclasses.asdict(e) for name, e in self.entries.items()},
        }
        with replacing(folder / FILE) as file:
            file.write((json.dumps(fields, indent=1) + "\n").encode())

    @property
    def whole(self) -> dict[str, Entry]:
        """Those of which no run diverged."""
        return {name: entry for name, entry in self.entries.items() if entry.ends}

    @property
    def fair_costs(self) -> list[Cost]:
        """Without times that were not measured in turn: some of them another load has slowed."""
        in_turn = all(entry.in_turn for entry in self.entries.values())
        return [cost for cost in self.costs if in_turn or cost.name != "step_ms"]

    def frontier(self, cost: Cost) -> list[str]:
        """Names of those that no other beats in both the score and this cost, by rising cost."""
        sign = -1 if cost.more_is_better else 1
        score = self.judged[0].name
        points = {n: (sign * e.of(cost.name)[0], e.of(score)[0]) for n, e in self.whole.items()}
        found, best = [], float("inf")
        for name in sorted(points, key=points.__getitem__):
            if points[name][1] < best:
                found.append(name)
                best = points[name][1]
        return found

    def table(self) -> str:
        """As markdown; with the sweeps, if there was one."""
        fronts = {cost: self.frontier(cost) for cost in self.fair_costs}
        timed = any(cost.name == "step_ms" for cost in fronts)
        reference = self.entries["adamw"].step_ms[1] if timed and "adamw" in self.entries else None
        costs = ("learning rate", "state bytes", "step, ms", "of adamw's")
        headings = [*(column.heading for column in self.judged), *costs]
        lines = [
            f"| recipe | {' | '.join(headings)} | best for its | settings |",
            f"|---|{'---:|' * len(headings)}---|---|",
        ]
        for name, entry in self.entries.items():
            ms = entry.step_ms[1]
            cells = [
                *(column.ends(entry.ends.get(column.name)) for column in self.judged),
                f"{entry.learning_rate:g}{' (edge)' if entry.at_edge else ''}",
                f"{entry.state_bytes:,}",
                f"{ms:.1f}" if timed else "",
                "" if reference is None else f"{ms / reference:.2f}",
                ", ".join(cost.word for cost, names in fronts.items() if name in names),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} | {entry.settings} |")
        table = "\n".join(lines) + "\n"
        if any(len(entry.swept) > 1 for entry in self.entries.values()):
            grids = "\n".join(f"- {name}: {_grid(e.swept)}" for name, e in self.entries.items())
            table += f"\nLearning rate → {self.judged[0].heading} on the first seed:\n\n{grids}\n"
        return table


def _grid(swept: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{float(rate):g} → {'diverged' if x is None else f'{x:.4g}'}" for rate, x in swept.items()
    )


def load(path: pathlib.Path) -> Comparison:
    """From `comparison.json`, or the folder that has it.

    Raises:
      ValueError: something else.
    """
    path = path / FILE if path.is_dir() else path
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        return Comparison(
            fields["about"],
            fields["title"],
            [Column(**column) for column in fields["judged"]],
            [Cost(**cost) for cost in fields["costs"]],
            {name: Entry(**entry) for name, entry in fields["entries"].items()},
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not the {FILE} of a comparison ({error!r})") from error
