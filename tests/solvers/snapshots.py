"""Subproblems with their solutions, and what the authors' solver makes of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import load, names

from optax_structured.proximal.subproblem import Subproblem
from optax_structured.trees.precision import wide_dtype

KINDS = ("group-lasso", "nuclear-norm")


def snapshots(kind, *needed):
    """One pytest parameter a case of all files of a kind: its `meta` and its arrays, in float64.

    Args:
      kind: one of `KINDS`, as the files say, or the name of one file.
      needed: arrays that a case must have.
    """
    for name in names("subproblem-"):
        assert load(name).system in KINDS, f"{name} is of none of the kinds {KINDS}"
    return [
        pytest.param(case, id=f"{name}-{case['name']}")
        for name in names("subproblem-")
        if kind in (name, load(name).system)
        for case in _cases(load(name))
        if {*needed} <= case.keys()
    ]


def nuclear(name):
    """One case of the public file, by its name there."""
    cases = _cases(load("subproblem-nuclear"))
    return next(case for case in cases if case["name"] == name)


def _cases(golden):
    for case in golden.meta["cases"]:
        arrays = {k: x.astype(np.float64) for k, x in golden.leaves(case["key"]).items()}
        yield case | arrays | {"b": arrays["P"] * arrays["W0"] - arrays["V"]}


def solve(solver, regularizer, direction, metric, centre, weight, warm):
    """What a solver finds for a subproblem of these arrays and numbers."""
    dtype = wide_dtype(direction, metric)
    *problem, warm = (jnp.asarray(x, dtype) for x in (direction, metric, centre, weight, warm))
    return solver.solve(regularizer, Subproblem(*problem), warm)


def arguments(case):
    """What `solve` is given."""
    return case["V"], case["P"], case["W0"], case["tau"], case["warm"]


def quadratic(b, metric, w):
    return np.sum(0.5 * metric * w * w - b * w)
