"""What the commands do: one run with its report, or several side by side."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from optax_structured import report
from optax_structured.training.folder import CONFIG, check_empty
from optax_structured.training.images import config, data, loop, plots
from optax_structured.training.images.config import Config
from optax_structured.training.images.experiment import Experiment
from optax_structured.training.state_bits import folder_name, in_words

OPTIONS = frozenset({field.name for field in dataclasses.fields(Config)} | {"stages"})


def new(given: Mapping[str, Any]) -> Experiment:
    """An experiment from the options that were given; None counts as not given."""
    images = data.load(
        given.get("data") or "digits", given.get("data_dir") or data.FASHION_MNIST_DIR
    )
    return Experiment(config.make(dict(given), len(images.train)), images)


def stored(folder: pathlib.Path, given: Mapping[str, Any]) -> Experiment:
    """The experiment of a run folder, after a check that nothing else was asked for."""
    found = config.load(folder)
    config.check_same(found, dict(given))
    return Experiment(found, data.load(found.data, given.get("data_dir") or found.data_dir))


def default_name(experiment: Experiment) -> str:
    """The run folder in runs/."""
    chosen = experiment.config
    name = folder_name(chosen.recipe, chosen.state_bits)
    return f"{name}-{chosen.model}-{chosen.data}-{chosen.seed}"


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
    total = chosen.epochs * experiment.steps_per_epoch

    def describe(row: report.Row) -> str:
        return report.structure_line(row, chosen.regularizer)

    with report.progress(console, label, total, describe) as watch:
        return loop.train(experiment, folder, resume=resume, stop_after=stop_after, watch=watch)


def describe_run(result: loop.Result, folder: pathlib.Path, console: Console) -> None:
    """Prints the table of the layers and the last numbers, draws the pictures."""
    experiment, chosen = result.experiment, result.experiment.config
    summary = experiment.summary(result.state)
    console.print(report.layer_table(summary.rows, summary.point_rows, chosen.strength))
    last = result.rows[-1]
    key, name = report.measure(chosen.regularizer)
    console.print(
        f"test accuracy {last['accuracy']:.2%} of W, {last['point_accuracy']:.2%} of Ŵ; "
        f"{name} {last[key]:.2%} of W, {last['point_' + key]:.2%} of Ŵ\n"
        f"objective {summary.objective:.5f}, "
        f"distance to stationarity {summary.stationarity:.2e}"
    )
    title = f"{chosen.recipe}: {chosen.model} on {chosen.data}"
    steps = [m * experiment.steps_per_epoch for m in chosen.milestones]
    plots.draw_training(result.rows, chosen.regularizer, steps, title, folder / "training.png")
    plots.draw_layers(
        result.strips, chosen.regularizer, chosen.milestones, title, folder / "layers.png"
    )


def compare(
    experiments: Sequence[Experiment],
    seeds: Sequence[int],
    folder: pathlib.Path,
    console: Console,
    *,
    resume: bool = False,
) -> str:
    """Runs every experiment from every seed; the table of the ends, as markdown.

    Each run has a folder of its own in `folder`, next to `comparison.md` and `comparison.png`. With
    `resume`, finished runs are read and unfinished ones continued.
    """
    if not resume:
        check_empty(folder)
    runs: dict[str, list[list[loop.Row]]] = {}
    for experiment in experiments:
        runs[experiment.config.recipe] = of_recipe = []
        for seed in seeds:
            seeded = experiment.for_seed(seed)
            one = folder / f"{seeded.config.recipe}-{seed}"
            started = (one / CONFIG).exists()
            if started:
                config.check_same(config.load(one), vars(seeded.config))
            of_recipe.append(run(seeded, one, console, resume=started).rows)
    first = experiments[0].config
    steps = [m * experiments[0].steps_per_epoch for m in first.milestones]
    settings = {e.config.recipe: _hyperparameters(e.config) for e in experiments}
    heading = f"{common_settings(first)}, seeds {', '.join(map(str, seeds))}"
    table = report.comparison_markdown(runs, settings, first.regularizer)
    (folder / "comparison.md").write_text(f"{heading}\n\n{table}")
    title = f"{first.model} on {first.data}, {len(seeds)} seeds"
    plots.draw_comparison(runs, first.regularizer, steps, title, folder / "comparison.png")
    return table


def announce(experiment: Experiment, console: Console) -> None:
    """Prints what is about to run, and how its strength compares with the data's scale."""
    chosen = experiment.config
    console.print(escape(f"{chosen.recipe}: {common_settings(chosen)}, seed {chosen.seed}"))
    console.print(escape(_hyperparameters(chosen)))
    if chosen.strength:
        scale = float(experiment.summary(experiment.init()).strength_max)
        console.print(
            f"the strength is {chosen.strength / scale:.2%} of {scale:.3g}, the largest dual norm "
            "of the gradient at the initial weights"
        )


def common_settings(chosen: Config) -> str:
    """What all runs of a comparison share, in words."""
    stages = f"stages end after epochs {', '.join(map(str, chosen.milestones))}"
    return (
        f"{chosen.model} on {chosen.data}, {chosen.regularizer}, {chosen.epochs} epochs of "
        f"batches of {chosen.batch_size}, {stages if chosen.milestones else 'one stage'}"
    )


def _hyperparameters(chosen: Config) -> str:
    shown = {
        "learning rate": chosen.learning_rate,
        "strength": chosen.strength,
        "momentum": chosen.momentum,
        "eps": chosen.eps,
    }
    listed = [f"{name} {value:g}" for name, value in shown.items() if value]
    return ", ".join(filter(None, (*listed, in_words(chosen.state_bits))))
