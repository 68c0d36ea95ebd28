"""The smallest run of the language-model job."""

import functools

from optax_structured.training.lm import config, recipes, text
from optax_structured.training.lm.experiment import Experiment

TEXT = text.load()._replace(held_out=text.load().held_out[:1000])
SIZES = {"width": 16, "layers": 1, "heads": 2, "sequence": 16, "batch_size": 2}


def fresh(recipe="adamw", **given):
    """Compiled anew, as in a new process."""
    small = {**SIZES, "steps": 12, "evaluate_every": 5}
    known = recipes.find(recipe)
    if known.low_rank:
        small |= {"rank": known.rank or 4, "period": min(known.period, 5)}
    return Experiment(config.make({"recipe": recipe, **small, **given}, TEXT), TEXT)


experiment = functools.cache(fresh)
