"""`optax-structured plan`: weights, gradients and optimizer state, before anything is allocated."""

import pathlib
from typing import Annotated

import jax.numpy as jnp
import typer

import optax_structured as oxs
from optax_structured import planning
from optax_structured.cli.common import option, sentences
from optax_structured.memory import LLAMA_MODELS
from optax_structured.training.report import show
from optax_structured.training.state_bits import HELP
from optax_structured.trees import Rules

_MODELS = ", ".join(f"llama-{size}" for size in LLAMA_MODELS)


def plan(
    model: Annotated[str | None, typer.Argument(help=f"One of {_MODELS}.")] = None,
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(planning.RECIPES)}.")] = "galore",
    rank: Annotated[
        int | None, option("Rank of each matrix; default as published, or 128.")
    ] = None,
    budget: Annotated[
        float | None,
        option("GB of a device: the largest rank with which weights, gradients and state fit."),
    ] = None,
    state_bits: Annotated[int | None, option(f"{HELP}.")] = None,
    mesh: Annotated[str | None, option("Devices, as fsdp=8 or fsdp=8,tensor=2.")] = None,
    chip: Annotated[
        str | None,
        option(
            f"One of {', '.join(planning.CHIPS)}: whether it fits, and, with the extra "
            "tpu-compile, what the compiled step takes and sends."
        ),
    ] = None,
    params_json: Annotated[
        pathlib.Path | None, option('Shapes instead of a model: {"path": [512, 512], ...}.')
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and gradients.")] = "float32",
    stacked: Annotated[
        bool, typer.Option("--stacked", help="One leaf for all layers, as a scan holds them.")
    ] = False,
    plain: Annotated[
        str | None, option("Pattern of the leaves left plain; default embed|head|norm.")
    ] = None,
) -> None:
    """Print the memory that a model needs under AdamW and under a recipe, on each device too."""
    with sentences() as console:
        if (model is None) == (params_json is None):
            raise ValueError(f"give one of {_MODELS}, or --params-json FILE")
        kind = _dtype(dtype)
        if params_json is not None:
            name, params = params_json.stem, planning.read_params(params_json, kind)
        else:
            name, params = str(model), planning.named_model(str(model), kind, stacked=stacked)
        devices = planning.parse_mesh(mesh)

        def structure(rank: int) -> Rules:
            return planning.low_rank_rules(oxs.LowRank(rank=rank), params, plain)

        if budget is not None:
            if rank is not None:
                raise ValueError("give --rank or --budget, from which a rank follows, not both")
            size = round(1e9 * budget)
            rank = planning.largest_rank(params, recipe, structure, devices, size, state_bits)
            console.print(f"The largest rank that fits into {budget:g} GB is {rank}.\n")
        chosen = structure(_published_rank(recipe, model) if rank is None else rank)
        found = None if chip is None else planning.find_chip(chip)
        made = planning.make_plan(name, params, recipe, chosen, devices, state_bits, found)
        show(console, planning.render(made, console.width))


def _published_rank(recipe: str, model: str | None) -> int:
    if recipe == "apollo_mini":
        return 1
    return LLAMA_MODELS[model.lower().removeprefix("llama-")].rank if model else 128


def _dtype(name: str) -> jnp.dtype:
    try:
        return jnp.dtype(name)
    except TypeError:
        raise ValueError(
            f"--dtype {name}: no such dtype; for example float32 or bfloat16"
        ) from None
