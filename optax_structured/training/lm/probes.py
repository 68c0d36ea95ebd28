"""What each low-rank leaf does during a run: the diagnostics, at every evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_structured import diagnostics
from optax_structured.training.folder import Row
from optax_structured.training.lm.experiment import Experiment, State


class Moment(NamedTuple):
    """An optimizer in the middle of a run, and what it would do with the next gradient."""

    gradient: Any
    state: Any
    after: Any  # the state after that step
    refitted: Any  # and if all bases were fitted anew in it
    low_rank: Any


Measure = Callable[..., Mapping[str, jax.Array]]  # path -> (*batch,), of the low-rank leaves


# By the name in `diagnostics`: what each is asked.
_ARGUMENTS: dict[str, Callable[[Moment], tuple[Any, ...]]] = {
    "captured_energy": lambda m: (m.state, m.gradient, m.low_rank),
    "effective_rank": lambda m: (m.state, m.gradient, m.low_rank),
    "subspace_overlap": lambda m: (m.state, m.refitted, m.low_rank),
    "limiter_activity": lambda m: (m.state, m.after, m.low_rank),
}


def _measures() -> dict[str, Measure]:
    return {name: getattr(diagnostics, name) for name in _ARGUMENTS if hasattr(diagnostics, name)}


class Probes:
    """Measures the leaves of one run; nothing of a run depends on it."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._measures = {} if experiment.low_rank is None else _measures()
        self._measure = jax.jit(self._measure_all)

    def rows(self, state: State, step: int) -> list[Row]:
        """One row a low-rank leaf; none for a recipe that keeps full rank."""
        if not self._measures:
            return []
        gradient = self._experiment.gradient(state.params, step)
        found = jax.device_get(self._measure(state, gradient))
        paths = dict.fromkeys(path for of_leaf in found.values() for path in of_leaf)
        return [
            {
                "step": step,
                "path": path,
                # Of a stack of layers, the mean. A leaf that a measure leaves out has no number.
                **{name: float(np.mean(of.get(path, np.nan))) for name, of in found.items()},
            }
            for path in paths
        ]

    def _measure_all(self, state: State, gradient: Any) -> dict[str, Mapping[str, jax.Array]]:
        optimizer = optax.with_extra_args_support(self._experiment.optimizer())
        params, opt_state = state
        _, after = optimizer.update(gradient, opt_state, params)
        _, refitted = optimizer.update(gradient, opt_state, params, refresh=True)
        moment = Moment(gradient, opt_state, after, refitted, self._experiment.low_rank)
        return {name: f(*_ARGUMENTS[name](moment)) for name, f in self._measures.items()}
