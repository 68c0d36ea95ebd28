"""`optax-structured compare`: several recipes of one job side by side."""

import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.training.folder import CONFIG
from optax_structured.training.images import recipes_table
from optax_structured.training.images import session as images
from optax_structured.training.lm import recipes as lm_recipes
from optax_structured.training.lm import session as lm
from optax_structured.training.lm import sweep

_IMAGE_RECIPES = "adamw,prox_sgd,prox_adam,rmda,ramda"
_LM_RECIPES = "adamw,galore,fira,apollo,dct_adamw,ldadam"
_LM_SETTINGS: dict[str, Callable[[str], Any]] = {
    "rank": int,
    "period": int,
    "scale": float,
    "weight_decay": float,
    "clip": float,
    **dict.fromkeys(lm_recipes.PARTS, str),
}


def compare(
    context: typer.Context,
    task: options.Task = None,
    recipes: Annotated[
        str | None,
        common.option(
            f"Names, separated by commas; default {_IMAGE_RECIPES}, or {_LM_RECIPES}. The same "
            "recipe twice: galore,galore@svd (and --set galore@svd.projector=svd), or, with 8 bits "
            "of state in place of --state-bits, galore,galore:8."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Numbers, separated by commas.")] = "0,1,2",
    settings: Annotated[
        list[str] | None,
        common.option("RECIPE.NAME=VALUE, as ramda.momentum=0.9; may be repeated.", "--set"),
    ] = None,
    batch_size: options.BatchSize = None,
    state_bits: options.StateBits = None,
    out: options.Out = None,
    resume: Annotated[
        pathlib.Path | None, common.option("Continue the comparison in this folder, same options.")
    ] = None,
    data_name: options.Data = None,
    data_dir: options.DataDir = None,
    model: options.Model = None,
    regularizer: options.Penalty = None,
    strength: options.Strength = None,
    epochs: options.Epochs = None,
    stages: options.NumberOfStages = None,
    milestones: options.Milestones = None,
    learning_rates: Annotated[
        str | None,
        common.option(
            "Swept for each recipe on the first seed, as 3e-4,1e-3; default 0.3, 1, 3 and 10 "
            "times the recipe's own. --set galore.learning_rates=1e-2,3e-2 for one alone.",
            panel=options.LM,
        ),
    ] = None,
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
    weight_decay: options.WeightDecay = None,
    clip: options.Clip = None,
) -> None:
    """Train several recipes from the same seeds on the same data; a table of how they end."""
    with common.sentences() as console:
        common.check_one_folder(resume, out)
        if resume:
            task = _stored_task(resume, task)
        job, given = options.job_of(context, task)
        default = _IMAGE_RECIPES if job is images else _LM_RECIPES
        names = common.names(default if recipes is None else recipes)
        numbers = common.numbers("--seeds", seeds, int) or (0,)
        prepare = _of_images if job is images else _of_lm
        plan = prepare(names, settings or [], given, numbers)
        folder = resume or out or pathlib.Path("runs") / plan.default_name
        console.print(escape(plan.shared))
        advice = f"Continue with the same options and --resume {folder}"
        with common.interruptible(console, advice):
            table = plan.run(folder, console, resume=bool(resume))
        console.print(f"\n{table}", markup=False, soft_wrap=True)
        console.print(escape(f"Written to {folder}"))


def _stored_task(folder: pathlib.Path, task: str | None) -> str | None:
    """The task of all runs in a folder; raises as `options.stored_task`."""
    runs = sorted(config.parent for config in folder.glob(f"*/{CONFIG}"))
    if not runs:
        raise FileNotFoundError(f"{folder} holds no runs to continue: begin with --out {folder}")
    for run in runs:
        task = options.stored_task(run, task)
    return task


class _Comparison(NamedTuple):
    """What is to be run."""

    default_name: str  # of its folder in runs/
    shared: str  # the settings of all runs, in words
    run: Callable[..., str]  # of folder, console and resume; gives the table


def _of_images(
    names: list[str], settings: list[str], given: dict[str, Any], seeds: tuple[int, ...]
) -> _Comparison:
    fields = recipes_table.Hyperparameters._fields
    own = common.own_settings(settings, names, dict.fromkeys(fields, float))
    experiments = []
    for name in names:
        dropped = {"strength"} if name == "adamw" else set()
        shared = {k: v for k, v in given.items() if k not in dropped}
        experiments.append(images.new({"recipe": name, **shared, **own[name]}))
    chosen = experiments[0].config
    run = functools.partial(images.compare, experiments, seeds)
    name = f"compare-{chosen.model}-{chosen.data}"
    return _Comparison(name, images.common_settings(chosen), run)


def _of_lm(
    names: list[str], settings: list[str], given: dict[str, Any], seeds: tuple[int, ...]
) -> _Comparison:
    kinds = {"learning_rates": _rates, **_LM_SETTINGS}
    own = common.own_settings(settings, names, kinds)
    shared_rates = common.numbers("--learning-rates", given.pop("learning_rates", None), float)
    experiments, rates = {}, {}
    for name in names:
        base, bits = _parsed(name)
        recipe = lm_recipes.find(base)
        defaults = tuple(float(f"{recipe.learning_rate * f:.3g}") for f in sweep.FACTORS)
        rates[name] = own[name].pop("learning_rates", shared_rates or defaults)
        fixed = {"rank": recipe.rank is not None, "period": recipe.period == 1}
        shared = {
            k: v for k, v in given.items() if k not in fixed or (recipe.low_rank and not fixed[k])
        }
        experiments[name] = lm.new({"recipe": base, **shared, **bits, **own[name]})
    sweep.check_budget(rates)
    run = functools.partial(sweep.compare, experiments, rates, seeds)
    return _Comparison("compare-lm", lm.common_settings(experiments[names[0]]), run)


def _parsed(name: str) -> tuple[str, dict[str, int]]:
    """The recipe and the bits of its state in RECIPE:BITS@LABEL, where both ends may be missing."""
    recipe, separator, bits = name.partition("@")[0].partition(":")
    if not separator:
        return recipe, {}
    if not bits.isdecimal():
        raise ValueError(f"--recipes {name}: after the colon come the bits of the state, as in :8")
    return recipe, {"state_bits": int(bits)}


def _rates(text: str) -> tuple[float, ...]:
    return common.numbers("learning_rates", text, float) or ()
