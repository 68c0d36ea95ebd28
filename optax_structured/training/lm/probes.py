"""What each low-rank leaf does during a run: the diagnostics, at every evaluation."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from optax_structured import diagnostics
from optax_structured.training.folder import Row
from optax_structured.training.task import State, Task

Measured = dict[str, Mapping[str, jax.Array]]


def measure(task: Task, state: State, gradient: Any) -> Measured:
    """By name and path, (*batch,): now, and in a step that is not taken.

    Overlap is that of the present subspaces with those that this gradient would bring: nothing
    of the past has to be kept for it, so a run continues bit for bit.
    """
    optimizer = optax.with_extra_args_support(task.optimizer(task.config.learning_rate))
    low_rank, (params, now) = task.structure, state
    _, after = optimizer.update(gradient, now, params)
    _, refitted = optimizer.update(gradient, now, params, refresh=True)
    return {
        "captured_energy": diagnostics.captured_energy(now, gradient, low_rank),
        "effective_rank": diagnostics.effective_rank(now, gradient, low_rank),
        "subspace_overlap": diagnostics.subspace_overlap(now, refitted, low_rank),
        "limiter_activity": diagnostics.limiter_activity(now, after, low_rank),
    }


def rows(measured: Measured, step: int) -> list[Row]:
    """One row per low-rank leaf; what a recipe does not have, such as a limiter, has no column."""
    found = {name: of_leaf for name, of_leaf in measured.items() if of_leaf}
    paths = dict.fromkeys(path for of_leaf in found.values() for path in of_leaf)
    return [
        {
            "step": step,
            "path": path,
            **{name: float(np.mean(of.get(path, np.nan))) for name, of in found.items()},
        }
        for path in paths
    ]
