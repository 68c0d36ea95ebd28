"""The tasks by name."""

from optax_structured.training.finetune.task import Finetune
from optax_structured.training.images.task import Images
from optax_structured.training.lm.task import LanguageModel
from optax_structured.training.names import chosen
from optax_structured.training.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Images, LanguageModel, Finetune)}
DEFAULT = Images.name


def find(name: str | None, recipe: str | None = None) -> type[Task]:
    """The task of this name, or the default; for a recipe, if one is given.

    Raises:
      ValueError: there is none, or the recipe is one of another task.
    """
    name = name or DEFAULT
    found = chosen("task", name, TASKS)
    others = [task.name for task in TASKS.values() if recipe in task.recipes]
    if recipe not in found.recipes and others:
        raise ValueError(
            f"the task {name} has no recipe {recipe!r}: add --task {others[0]}, or choose one of "
            f"{', '.join(found.recipes)}"
        )
    return found
