"""How much of real gradients each projector holds, against the SVD: the worst leaf and the mean.

`python tests/benchmarks/captured_energy.py` trains the default language model with `galore` and
fits every projector to the gradient of the moment: at the first step as often as new ones are,
later once, from the basis in use. Prints the ratio of captured norms and the largest defect of
orthonormality.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax.numpy as jnp
import numpy as np

import optax_structured as oxs
from optax_structured.projectors import Refit
from optax_structured.training import run
from optax_structured.training.lm.task import LanguageModel
from optax_structured.trees import named_leaves

RANK, STEPS = 32, (0, 50, 100)
PROJECTORS = {
    "SubspaceIteration()": oxs.SubspaceIteration(),
    "SubspaceIteration(first_fits=1)": oxs.SubspaceIteration(first_fits=1),
    "SubspaceIteration(iterations=2)": oxs.SubspaceIteration(iterations=2),
    "RandomizedRange()": oxs.RandomizedRange(),
    "DCT()": oxs.DCT(),
}


def measure(projector, frame, basis, gradient, warm):
    oriented = frame.orient(gradient)
    basis = basis if warm else projector.init(frame, jnp.float32, "")
    for again in range(1 if warm else projector.first_fits):
        fitted = jnp.full(frame.batch, warm or again > 0)
        due, turned = jnp.ones(frame.batch, bool), frame.turn(oriented)
        basis, _ = projector.refit(Refit(frame, basis, turned, due, fitted, jnp.uint32(0)))
    matrix = projector.factors(frame, basis).T
    singular = jnp.linalg.svd(oriented, compute_uv=False)
    best = jnp.sqrt(jnp.sum(singular[: frame.rank] ** 2))
    held = jnp.linalg.norm(matrix.T @ oriented)
    defect = jnp.max(jnp.abs(matrix.T @ matrix - jnp.eye(frame.rank)))
    return float(held / best), float(defect)


def main():
    task = run.new(LanguageModel, {"recipe": "galore", "steps": 400, "rank": RANK})
    state, done = task.init(), 0
    print(f"{'step':>5}  {'projector':34}{'worst':>8}{'mean':>8}{'defect':>10}")
    for step in STEPS:
        for first in range(done, step, task.steps_a_call):
            state, _ = task.steps(state, first, task.steps_a_call)
        done = step
        gradient = dict(named_leaves(task.gradient(state.params, step)))
        bases = state.opt_state.inner_state[0].bases
        for name, projector in PROJECTORS.items():
            warm = step > 0 and isinstance(projector, oxs.SubspaceIteration)
            spec = oxs.LowRank(RANK, axes=oxs.Axes(rows=-1, cols=-2), projector=projector)
            found = [
                measure(projector, spec.frame(g.shape), bases.get(path), g, warm)
                for path, g in gradient.items()
                if path in bases
            ]
            ratios, defects = np.array(found).T
            worst, mean, defect = ratios.min(), ratios.mean(), defects.max()
            print(f"{step:5}  {name:34}{worst:8.4f}{mean:8.4f}{defect:10.1e}")


if __name__ == "__main__":
    main()
