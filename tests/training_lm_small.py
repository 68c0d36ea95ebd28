"""The smallest run of the language-model job."""

import functools

from optax_structured.training.lm import config, text
from optax_structured.training.lm.experiment import Experiment

TEXT = text.load()._replace(held_out=text.load().held_out[:1000])
SIZES = {"width": 16, "layers": 1, "heads": 2, "sequence": 16, "batch_size": 2}


def fresh(recipe="adamw", **given):
    """Compiled anew, as in a new process."""
    small = {**SIZES, "steps": 12, "evaluate_every": 5, **given}
    if recipe != "adamw":
        small = {"rank": 1 if recipe == "apollo_mini" else 4, "period": 5, **small}
    return Experiment(config.make({"recipe": recipe, **small}, TEXT), TEXT)


experiment = functools.cache(fresh)
