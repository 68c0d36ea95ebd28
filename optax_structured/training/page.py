"""One HTML file about a run, which opens without a server or a network."""

import base64
import dataclasses
import html
import pathlib
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from optax_structured.memory import memory_report
from optax_structured.training.checkpoint import Checkpoints
from optax_structured.training.config import Config
from optax_structured.training.folder import Row
from optax_structured.training.history import evaluations
from optax_structured.training.kernel_maps import draw_kernels
from optax_structured.training.task import Task

PAGE = "report.html"
_CAPTIONS = {
    "training": "Loss, and what the run is judged by, over the steps.",
    "layers": "Structure per layer over time: which of its inputs are left.",
    "leaves": "What the subspace of each leaf holds of its gradient, and how it moves.",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #22313a; --paper: #fff; --line: #8a949a55; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ea; --paper: #16191b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
       border-bottom: 1px solid var(--line); } td, code { overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 4px; }
"""


def write_page(task: Task, folder: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into the run folder, from its checkpoint, tables and pictures.

    Raises:
      FileNotFoundError: the run has no checkpoint or no evaluation yet.
    """
    rows = evaluations(folder)
    if not rows:
        raise FileNotFoundError(f"{folder} holds no evaluation yet: let the run reach its first")
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.restore(task.abstract_state())
    optimizer = task.optimizer(task.config.learning_rate)
    found = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    pictures = {name: found.pop(name) for name in _CAPTIONS if name in found} | found
    if kernels := draw_kernels(state.params, task.structure):
        pictures["kernels"] = kernels
    body = [
        _tag("h1", task.title),
        _tag("p", f"{task.describe()}; step {step:,} of {task.total_steps:,}."),
        _table(_ends(task, rows[-1])),
        *(_picture(name, picture) for name, picture in pictures.items()),
        _tag("h2", "Bytes"),
        _tag("pre", str(memory_report(optimizer, state.params))),
        _tag("h2", "Configuration"),
        _table({name.replace("_", " "): x for name, x in vars(task.config).items()}),
        _tag("h2", "To run it again"),
        f"<p>{_tag('code', command(task.config))}</p>",
    ]
    path = folder / PAGE
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"{_tag('title', task.title)}<style>{_STYLE}</style>"
    path.write_text(f"<!doctype html><html lang=en>{head}{''.join(body)}</html>\n")
    return path


def command(config: Config) -> str:
    """The command line that makes the same run."""
    words = ["optax-structured", "train", "--task", config.task, "--recipe", config.recipe]
    options: dict[str, dataclasses.Field[Any]] = type(config).options()
    given = {name: getattr(config, name) for name in options}
    if given.get("stages") is not None:
        given.pop("milestones")  # they follow
    for name, value in given.items():
        if value is None or value is False or value == ():
            continue
        flag = f"--{name.replace('_', '-')}"
        listed = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [flag] if value is True else [flag, listed]
    return shlex.join(words)


def _ends(task: Task, last: Row) -> dict[str, Any]:
    ends = {column.heading: column.ends([last[column.name]]) for column in task.columns}
    return ends | {
        "milliseconds a step": f"{last['step_ms']:.2f}",
        "steps skipped": last["skipped"],
    }


def _tag(name: str, text: str) -> str:
    return f"<{name}>{html.escape(text)}</{name}>"


def _table(cells: Mapping[str, Any]) -> str:
    rows: Iterable[str] = (
        f"<tr>{_tag('th', key)}{_tag('td', f'{value}')}</tr>" for key, value in cells.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _picture(name: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    caption = _CAPTIONS.get(name, "")
    image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    return f"{_tag('h2', name.capitalize())}{_tag('p', caption) if caption else ''}{image}"
