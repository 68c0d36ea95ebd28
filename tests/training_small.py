"""The smallest runs of the training tasks."""

import functools

from optax_structured.training import run
from optax_structured.training.images.task import Images
from optax_structured.training.lm import recipes, text
from optax_structured.training.lm.config import Config
from optax_structured.training.lm.task import LanguageModel

TEXT = text.load()._replace(held_out=text.load().held_out[:1000])
FACTS = {"text_sha256": TEXT.digest, "train_bytes": len(TEXT.train)}
SIZES = {"width": 16, "layers": 1, "heads": 2, "sequence": 16, "batch_size": 2}


def fresh_images(recipe="ramda", model="logistic", **given):
    """A new task, with nothing compiled, as in a new process."""
    small = {"epochs": 6, "batch_size": 128, **({} if "milestones" in given else {"stages": 3})}
    return run.new(Images, {"recipe": recipe, "model": model, **small, **given})


def fresh_lm(recipe="adamw", **given):
    """A new task, with nothing compiled, as in a new process."""
    small = {**SIZES, "steps": 12, "evaluate_every": 5}
    known = recipes.RECIPES[recipe]
    if known.period:
        small |= {"rank": known.rank or 4, "period": min(known.period, 5)}
    return LanguageModel(Config(recipe=recipe, **{**small, **given, **FACTS}), TEXT)


images, lm = functools.cache(fresh_images), functools.cache(fresh_lm)


def numbers(rows):
    """The rows of a run without what a clock says."""
    return [
        {k: v for k, v in row.items() if k not in ("steps_per_second", "step_ms")} for row in rows
    ]
