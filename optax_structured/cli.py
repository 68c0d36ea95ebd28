"""The command: `optax-structured train` and `optax-structured compare`."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape

    from optax_structured.training import data, loop, models, recipes_table, session
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the command needs {error.name}: pip install 'optax-structured[train]'"
    ) from error

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train networks that end up exactly structured.",
)


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


def _one_of(names: Iterable[str], default: str) -> str:
    return f"One of {', '.join(names)}; default {default}."


# Every option is None unless given, so that a resumed run can be checked against it.
Data = Annotated[str | None, _option(_one_of(data.NAMES, "digits"), "--data")]
DataDir = Annotated[
    str | None, _option(f"Folder of the Fashion-MNIST files; default {data.FASHION_MNIST_DIR}.")
]
Model = Annotated[str | None, _option(_one_of(models.NAMES, "conv"))]
Penalty = Annotated[
    str | None, _option(_one_of(recipes_table.REGULARIZERS, "group_lasso"), "--regularizer")
]
Strength = Annotated[float | None, _option("Weight of the penalty; default as published.")]
Epochs = Annotated[int | None, _option("Passes over the training images; default 100.")]
BatchSize = Annotated[int | None, _option("Images a step; default 32 (digits) or 128.")]
NumberOfStages = Annotated[int | None, _option("Number of equal stages; default 5.", "--stages")]
Milestones = Annotated[
    str | None, _option("Epochs after which a stage ends, as 20,40,60, in place of --stages.")
]
Out = Annotated[pathlib.Path | None, _option("Run folder; default runs/ and the names.")]


@app.command()
def train(
    recipe: Annotated[str | None, _option(_one_of(recipes_table.RECIPES, "ramda"))] = None,
    data_name: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    regularizer: Penalty = None,
    strength: Strength = None,
    learning_rate: Annotated[float | None, _option("Default as published.")] = None,
    momentum: Annotated[
        float | None,
        _option(
            "Share of the last iterate that is kept (Adam's b1); default as published, less "
            "for ramda and rmda in short runs."
        ),
    ] = None,
    eps: Annotated[float | None, _option("Default as published.")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    stages: NumberOfStages = None,
    milestones: Milestones = None,
    seed: Annotated[int | None, _option("Of weights and order of data; default 0.")] = None,
    out: Out = None,
    resume: Annotated[
        pathlib.Path | None, _option("Continue the run in this folder, bit for bit.")
    ] = None,
    stop_after: Annotated[
        int | None, _option("Leave after this many epochs in all, to be resumed later.")
    ] = None,
) -> None:
    """Train a network on real images with one recipe, and write a run folder."""
    with _sentences() as console:
        given = {
            "recipe": recipe,
            "data": data_name,
            "data_dir": data_dir,
            "model": model,
            "regularizer": regularizer,
            "strength": strength,
            "learning_rate": learning_rate,
            "momentum": momentum,
            "eps": eps,
            "epochs": epochs,
            "batch_size": batch_size,
            "stages": stages,
            "milestones": _numbers("--milestones", milestones),
            "seed": seed,
        }
        if resume and out:
            raise ValueError("a resumed run stays in its folder: give --resume or --out, not both")
        experiment = session.stored(resume, given) if resume else session.new(given)
        chosen = experiment.config
        name = f"{chosen.recipe}-{chosen.model}-{chosen.data}-{chosen.seed}"
        folder = resume or out or pathlib.Path("runs") / name
        if not resume:
            loop.check_empty(folder)
        session.announce(experiment, console)
        try:
            result = session.run(
                experiment, folder, console, resume=bool(resume), stop_after=stop_after
            )
        except KeyboardInterrupt:
            console.print(escape(f"Stopped. Continue with --resume {folder}"))
            raise typer.Exit(130) from None
        session.describe_run(result, folder, console)
        console.print(escape(f"Written to {folder}"))


@app.command()
def compare(
    recipes: Annotated[
        str, typer.Option(help="Names, separated by commas.")
    ] = "adamw,prox_sgd,prox_adam,rmda,ramda",
    seeds: Annotated[str, typer.Option(help="Numbers, separated by commas.")] = "0,1,2",
    data_name: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    regularizer: Penalty = None,
    strength: Strength = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    stages: NumberOfStages = None,
    milestones: Milestones = None,
    settings: Annotated[
        list[str] | None,
        _option("RECIPE.NAME=VALUE, as ramda.momentum=0.9; may be repeated.", "--set"),
    ] = None,
    out: Out = None,
    resume: Annotated[
        pathlib.Path | None, _option("Continue the comparison in this folder, same options.")
    ] = None,
) -> None:
    """Train several recipes from the same seeds, each with its published hyperparameters."""
    with _sentences() as console:
        if resume and out:
            raise ValueError("give --resume or --out, not both")
        names = [name.strip() for name in recipes.split(",")]
        own = _own_settings(settings or [], names)
        experiments = [
            session.new(
                {
                    "recipe": name,
                    "data": data_name,
                    "data_dir": data_dir,
                    "model": model,
                    "regularizer": regularizer,
                    "strength": None if name == "adamw" else strength,
                    "epochs": epochs,
                    "batch_size": batch_size,
                    "stages": stages,
                    "milestones": _numbers("--milestones", milestones),
                    **own[name],
                }
            )
            for name in names
        ]
        chosen = experiments[0].config
        folder = resume or out or pathlib.Path("runs") / f"compare-{chosen.model}-{chosen.data}"
        numbers = _numbers("--seeds", seeds) or (0,)
        console.print(escape(session.common_settings(chosen)))
        try:
            table = session.compare(experiments, numbers, folder, console, resume=bool(resume))
        except KeyboardInterrupt:
            console.print(escape(f"Stopped. Continue with the same options and --resume {folder}"))
            raise typer.Exit(130) from None
        console.print(f"\n{table}", markup=False, soft_wrap=True)
        console.print(escape(f"Written to {folder}"))


@contextlib.contextmanager
def _sentences() -> Iterator[Console]:
    """Says what the user can mend in one sentence; anything else keeps its traceback."""
    console = Console(highlight=False)
    try:
        yield console
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from error


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise ValueError(
            f"{option} takes whole numbers separated by commas, got {text!r}"
        ) from None


def _own_settings(settings: list[str], names: list[str]) -> dict[str, dict[str, float]]:
    """`RECIPE.NAME=VALUE` as a dictionary a recipe."""
    own: dict[str, dict[str, float]] = {name: {} for name in names}
    for setting in settings:
        target, _, value = setting.partition("=")
        name, _, field = target.partition(".")
        if name not in own or field not in recipes_table.Hyperparameters._fields:
            raise ValueError(
                f"--set {setting}: expected RECIPE.NAME=VALUE with a recipe of "
                f"{', '.join(names)} and a name of "
                f"{', '.join(recipes_table.Hyperparameters._fields)}"
            )
        try:
            own[name][field] = float(value)
        except ValueError:
            raise ValueError(f"--set {setting}: {value!r} is not a number") from None
    return own
