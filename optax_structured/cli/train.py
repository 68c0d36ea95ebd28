"""`optax-structured train`: one run of either job."""

import pathlib
from typing import Annotated

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.cli.common import one_of, option
from optax_structured.training.folder import check_empty
from optax_structured.training.images import recipes_table
from optax_structured.training.lm import recipes as lm_recipes


def train(
    context: typer.Context,
    task: options.Task = None,
    recipe: Annotated[
        str | None,
        option(
            f"For images {one_of(recipes_table.RECIPES, 'ramda')} "
            f"For lm {one_of(lm_recipes.RECIPES, 'galore')}"
        ),
    ] = None,
    learning_rate: Annotated[float | None, option("Default as published.")] = None,
    batch_size: options.BatchSize = None,
    state_bits: options.StateBits = None,
    seed: Annotated[int | None, option("Of weights and order of data; default 0.")] = None,
    out: options.Out = None,
    resume: Annotated[
        pathlib.Path | None, option("Continue the run in this folder, bit for bit.")
    ] = None,
    stop_after: Annotated[
        int | None,
        option("Leave after this many epochs (images) or steps (lm) in all, to be resumed."),
    ] = None,
    data_name: options.Data = None,
    data_dir: options.DataDir = None,
    model: options.Model = None,
    regularizer: options.Penalty = None,
    strength: options.Strength = None,
    momentum: Annotated[
        float | None,
        option(
            "Share of the last iterate that is kept (Adam's b1); default as published, less "
            "for ramda and rmda in short runs.",
            panel=options.IMAGES,
        ),
    ] = None,
    eps: Annotated[float | None, option("Default as published.", panel=options.IMAGES)] = None,
    epochs: options.Epochs = None,
    stages: options.NumberOfStages = None,
    milestones: options.Milestones = None,
    text: options.TextFile = None,
    width: options.Width = None,
    layers: options.Layers = None,
    heads: options.Heads = None,
    stacked: options.Stacked = None,
    sequence: options.Sequence = None,
    steps: options.Steps = None,
    evaluate_every: options.EvaluateEvery = None,
    rank: options.Rank = None,
    period: options.Period = None,
    scale: options.Scale = None,
    projector: options.Projector = None,
    refresh: options.Refresh = None,
    transport: options.Transport = None,
    weight_decay: options.WeightDecay = None,
    clip: options.Clip = None,
) -> None:
    """Train a network on real images or text with one recipe, and write a run folder."""
    with common.sentences() as console:
        common.check_one_folder(resume, out)
        if resume:
            task = options.stored_task(resume, task)
        job, given = options.job_of(context, task)
        experiment = job.stored(resume, given) if resume else job.new(given)
        folder = resume or out or pathlib.Path("runs") / job.default_name(experiment)
        if not resume:
            check_empty(folder)
        job.announce(experiment, console)
        with common.interruptible(console, f"Continue with --resume {folder}"):
            result = job.run(
                experiment, folder, console, resume=bool(resume), stop_after=stop_after
            )
        job.describe_run(result, folder, console)
        console.print(escape(f"Written to {folder}"))
