"""Golden files that do not exist: references run on leaves and settings of our choice."""

from typing import Any

import numpy as np
from golden_files import Golden


def made(
    name: str,
    system: str,
    reference: Any,
    leaves: dict[str, tuple[int, ...]],
    hyperparameters: dict[str, Any],
    *,
    steps: int = 7,
    **meta: Any,
) -> Golden:
    """What a file would hold; `reference(settings, w, grads)` gives parameters and states."""
    rng = np.random.default_rng(0)
    settings = hyperparameters | {k: v for k, v in meta.items() if not isinstance(v, str)}
    arrays = {}
    for leaf, shape in leaves.items():
        start, drift = rng.normal(size=(2, *shape))
        grads = drift + 0.5 * rng.normal(size=(steps, *shape))
        params, states = reference(settings, start, grads)
        arrays |= {f"params0/{leaf}": start, f"grads/{leaf}": grads}
        arrays[f"params/{leaf}"] = np.stack(params)
        for key in states[0]:
            arrays[f"state/{key}/{leaf}"] = np.stack([state[key] for state in states])
    shapes = {leaf: list(shape) for leaf, shape in leaves.items()}
    described = {
        "system": system,
        "steps": steps,
        "leaves": shapes,
        "hyperparameters": hyperparameters,
    }
    return Golden(name, described | meta, arrays)
