"""What the commands do with a language-model run: train with a live line, then report."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from optax_structured import report
from optax_structured.memory import MemoryReport, memory_report
from optax_structured.training.folder import check_same, write_table
from optax_structured.training.lm import config, loop, plots, recipes
from optax_structured.training.lm import text as texts
from optax_structured.training.lm.config import Config
from optax_structured.training.lm.experiment import Experiment
from optax_structured.training.state_bits import folder_name, in_words

STATE = "state.csv"
_FOUND_OUT = {"text_origin", "text_sha256", "task"}
# What a person may ask for: of one run, and the rates that a comparison sweeps.
OPTIONS = frozenset(
    {field.name for field in dataclasses.fields(Config)} - _FOUND_OUT | {"learning_rates"}
)


def new(given: Mapping[str, Any]) -> Experiment:
    """An experiment from the options that were given; None counts as not given."""
    text = texts.load(given.get("text") or texts.DEFAULT)
    return Experiment(config.make(given, text), text)


def stored(folder: pathlib.Path, given: Mapping[str, Any]) -> Experiment:
    """The experiment of a run folder, after a check that nothing else was asked for."""
    found = config.load(folder)
    check_same(found, given, ignoring=("text",))
    text = texts.load(given.get("text") or found.text)
    if text.digest != found.text_sha256:
        raise ValueError(
            f"{text.origin} is not the text of the run in {folder}, {found.text_origin}: their "
            "sha256 differ; give the same text with --text"
        )
    return Experiment(found, text)


def default_name(experiment: Experiment) -> str:
    """The run folder in runs/."""
    chosen = experiment.config
    name = folder_name(chosen.recipe, chosen.state_bits)
    return f"{name}-lm-{pathlib.Path(chosen.text).stem}-{chosen.seed}"


def announce(experiment: Experiment, console: Console) -> None:
    """Prints what is about to run, and what the optimizer will keep of each leaf."""
    chosen = experiment.config
    memory = memory_of(experiment)
    console.print(escape(f"{chosen.recipe}: {common_settings(experiment)}, seed {chosen.seed}"))
    console.print(escape(hyperparameters(chosen)))
    console.print(report.state_table(memory))


def memory_of(experiment: Experiment) -> MemoryReport:
    """Bytes of weights and optimizer state, leaf by leaf, before anything is allocated."""
    params, structure = experiment.abstract_params(), experiment.low_rank
    return memory_report(experiment.optimizer(), params, structure)


def run(
    experiment: Experiment,
    folder: pathlib.Path,
    console: Console,
    *,
    resume: bool = False,
    stop_after: int | None = None,
) -> loop.Result:
    """Trains with a live line."""
    chosen = experiment.config
    label = f"{folder_name(chosen.recipe, chosen.state_bits)} {chosen.seed}"
    state_bytes = memory_of(experiment).state_bytes

    def describe(row: report.Row) -> str:
        return report.text_line(row, state_bytes)

    with report.progress(console, label, chosen.steps, describe) as watch:
        return loop.train(experiment, folder, resume=resume, stop_after=stop_after, watch=watch)


def describe_run(result: loop.Result, folder: pathlib.Path, console: Console) -> None:
    """Prints the last numbers, writes the table of the state and the pictures."""
    experiment, chosen = result.experiment, result.experiment.config
    memory = memory_of(experiment)
    held = loop.state_bytes(result.state)
    write_table(
        folder / STATE,
        [
            {
                "path": leaf.path,
                "shape": "×".join(map(str, leaf.shape)),
                "rule": leaf.rule,
                "rank": getattr(leaf.spec, "rank", ""),
                "weight_bytes": leaf.weight_bytes,
                "state_bytes": leaf.state_bytes,
            }
            for leaf in memory.leaves
        ],
    )
    console.print(
        f"optimizer state {held:,} bytes, {memory.code_bytes:,} of them in codes of 8 or 4 bits, "
        f"{held / memory.weight_bytes:.2f} times the weights "
        f"(adamw: {2 * memory.weight_bytes:,}, 2.00 times)"
    )
    if result.rows:
        last = result.rows[-1]
        console.print(
            f"held-out perplexity {last['perplexity']:.4f} a byte, {last['bits_per_byte']:.4f} "
            f"bits a byte, over all {len(experiment.text.held_out):,} held-out bytes; "
            f"{last['step_ms']:.1f} ms a step"
        )
    title = f"{chosen.recipe} on {pathlib.Path(chosen.text).name}, seed {chosen.seed}"
    plots.draw_training(result.rows, np.asarray(result.losses), chosen, title, folder)
    plots.draw_leaves(result.leaves, title, folder)


def common_settings(experiment: Experiment) -> str:
    """What all runs of a comparison share, in words."""
    chosen, text = experiment.config, experiment.text
    size = sum(leaf.weight_bytes for leaf in memory_of(experiment).leaves) // 4
    return (
        f"{size:,} parameters (width {chosen.width}, {chosen.layers} layers, {chosen.heads} heads) "
        f"on {text.origin}, {chosen.steps} steps of {chosen.batch_size}×{chosen.sequence} bytes"
    )


def hyperparameters(chosen: Config) -> str:
    """What one recipe has of its own, with its learning rate."""
    return ", ".join(filter(None, (f"learning rate {chosen.learning_rate:g}", settings(chosen))))


def settings(chosen: Config) -> str:
    """What one recipe has of its own."""
    numbers = ("rank", "period", "scale", "weight_decay", "clip")
    shown = {name: getattr(chosen, name) for name in numbers}
    parts = [getattr(chosen, part) for part in recipes.PARTS]
    listed = [f"{name.replace('_', ' ')} {value:g}" for name, value in shown.items() if value]
    parts.append(in_words(chosen.state_bits))
    return ", ".join(listed + [part for part in parts if part])
