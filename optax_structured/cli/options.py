"""The options of `train` and `compare`, and which of them belong to which job."""

import pathlib
from types import ModuleType
from typing import Annotated, Any

import typer

from optax_structured.cli import common
from optax_structured.cli.common import one_of, option
from optax_structured.training import state_bits
from optax_structured.training.folder import stored_fields
from optax_structured.training.images import data, models, recipes_table
from optax_structured.training.images import session as images
from optax_structured.training.lm import recipes, text
from optax_structured.training.lm import session as lm
from optax_structured.training.names import check_known

JOBS: dict[str, ModuleType] = {"images": images, "lm": lm}
IMAGES, LM = "Task images", "Task lm"

Task = Annotated[
    str | None,
    option("images (structured sparsity; the default) or lm (a small language model)."),
]
Data = Annotated[str | None, option(one_of(data.NAMES, "digits"), "--data", panel=IMAGES)]
DataDir = Annotated[
    str | None,
    option(f"Folder of the Fashion-MNIST files; default {data.FASHION_MNIST_DIR}.", panel=IMAGES),
]
Model = Annotated[str | None, option(one_of(models.NAMES, "conv"), panel=IMAGES)]
Penalty = Annotated[
    str | None,
    option(one_of(recipes_table.REGULARIZERS, "group_lasso"), "--regularizer", panel=IMAGES),
]
Strength = Annotated[
    float | None, option("Weight of the penalty; default as published.", panel=IMAGES)
]
Epochs = Annotated[int | None, option("Passes over the images; default 100.", panel=IMAGES)]
NumberOfStages = Annotated[
    int | None, option("Number of equal stages; default 5.", "--stages", panel=IMAGES)
]
Milestones = Annotated[
    str | None,
    option("Epochs after which a stage ends, as 20,40,60, in place of --stages.", panel=IMAGES),
]
TextFile = Annotated[
    str | None, option(f"A text file; default {text.DEFAULT}, of Python itself.", panel=LM)
]
Width = Annotated[int | None, option("Of the residual stream; default 128.", panel=LM)]
Layers = Annotated[int | None, option("Default 2.", panel=LM)]
Heads = Annotated[int | None, option("Default 4.", panel=LM)]
Stacked = Annotated[
    bool | None, option("All layers as one leaf a kind, under a scan.", "--stacked", panel=LM)
]
Sequence = Annotated[int | None, option("Bytes of context; default 128.", panel=LM)]
Steps = Annotated[int | None, option("Default 2000.", panel=LM)]
EvaluateEvery = Annotated[
    int | None, option("Steps between evaluations; default a tenth of all.", panel=LM)
]
Rank = Annotated[int | None, option("Default a quarter of the width.", panel=LM)]
Period = Annotated[
    int | None, option("Steps between refreshes; default 50, or 1 as published.", panel=LM)
]
Scale = Annotated[float | None, option("Of the low-rank part; default as published.", panel=LM)]
Projector = Annotated[str | None, option(one_of(recipes.PROJECTORS, "the recipe's"), panel=LM)]
Refresh = Annotated[str | None, option(one_of(recipes.REFRESHES, "the recipe's"), panel=LM)]
Transport = Annotated[str | None, option(one_of(recipes.TRANSPORTS, "the recipe's"), panel=LM)]
WeightDecay = Annotated[float | None, option("Decoupled; default 0.", panel=LM)]
Clip = Annotated[float | None, option("Largest norm of the gradient; default 0, off.", panel=LM)]
BatchSize = Annotated[
    int | None, option("Images or sequences a step; default 32 (digits), 128, or 8 (lm).")
]
StateBits = Annotated[int | None, option(state_bits.HELP)]
Out = Annotated[pathlib.Path | None, option("Run folder; default runs/ and the names.")]

# Not of the run itself.
_CONTROL = {"task", "out", "resume", "stop_after", "recipes", "seeds", "settings"}


def stored_task(run: pathlib.Path, asked: str | None) -> str:
    """The task of a run folder.

    Raises:
      ValueError: another one was asked for.
    """
    task: str = stored_fields(run).get("task", "images")
    if asked not in (None, task):
        raise ValueError(f"{run} holds a run of the task {task}, not {asked}")
    return task


def job_of(context: typer.Context, task: str | None) -> tuple[ModuleType, dict[str, Any]]:
    """The job, and the options that were given for it.

    Raises:
      ValueError: an unknown task, or an option of the other one.
    """
    task = task or "images"
    check_known("task", task, JOBS)
    given = {k: v for k, v in context.params.items() if v is not None and k not in _CONTROL}
    if "data_name" in given:
        given["data"] = given.pop("data_name")
    if "milestones" in given:
        given["milestones"] = common.numbers("--milestones", given["milestones"], int)
    for name in given:
        if name not in JOBS[task].OPTIONS:
            raise ValueError(
                f"--{name.replace('_', '-')} has no meaning for the task {task}; leave it out, or "
                "choose another --task"
            )
    return JOBS[task], given
