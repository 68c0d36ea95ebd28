"""What each low-rank leaf does during a run: the diagnostics, at every evaluation."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from optax_structured import diagnostics
from optax_structured.training.folder import Row
from optax_structured.training.lm.experiment import Experiment, State


class Probes:
    """Measures the leaves of one run; nothing of a run depends on it."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._measured = jax.jit(self._measure)

    def rows(self, state: State, step: int) -> list[Row]:
        """One row a low-rank leaf; none for a recipe that keeps full rank."""
        if self._experiment.low_rank is None:
            return []
        gradient = self._experiment.gradient(state.params, step)
        found = jax.device_get(self._measured(state, gradient))
        # What this recipe does not have, such as a limiter, has no column.
        found = {name: of_leaf for name, of_leaf in found.items() if of_leaf}
        paths = dict.fromkeys(path for of_leaf in found.values() for path in of_leaf)
        return [
            {
                "step": step,
                "path": path,
                **{name: float(np.mean(of.get(path, np.nan))) for name, of in found.items()},
            }
            for path in paths
        ]

    def _measure(self, state: State, gradient: Any) -> dict[str, Mapping[str, jax.Array]]:
        """By name and path, (*batch,): now, and in a step that is not taken.

        Overlap is that of the present subspaces with those that this gradient would bring: nothing
        of the past has to be kept for it, so a run continues bit for bit.
        """
        optimizer = optax.with_extra_args_support(self._experiment.optimizer())
        low_rank = self._experiment.low_rank
        params, now = state
        _, after = optimizer.update(gradient, now, params)
        _, refitted = optimizer.update(gradient, now, params, refresh=True)
        return {
            "captured_energy": diagnostics.captured_energy(now, gradient, low_rank),
            "effective_rank": diagnostics.effective_rank(now, gradient, low_rank),
            "subspace_overlap": diagnostics.subspace_overlap(now, refitted, low_rank),
            "limiter_activity": diagnostics.limiter_activity(now, after, low_rank),
        }
