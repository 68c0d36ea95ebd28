"""Optax's own property suite for contributed optimizers, with our recipes in its table."""

import functools
import importlib.util
import inspect

import pytest
from absl.testing import parameterized

import optax_structured as oxs

# Small strengths: the suite asks for convergence to the minimum of the plain loss.
SMALL = {"regularizer": oxs.L1(), "strength": 1e-4}
RANK = {"low_rank": oxs.LowRank(rank=2, period=10)}

RECIPES = (
    {"opt_name": "ramda", "opt_kwargs": {"learning_rate": 1e-2, **SMALL}},
    {"opt_name": "rmda", "opt_kwargs": {"learning_rate": 1e-2, **SMALL}},
    {"opt_name": "prox_sgd", "opt_kwargs": {"learning_rate": 1e-3, **SMALL}},
    {"opt_name": "prox_adam", "opt_kwargs": {"learning_rate": 1e-2, **SMALL}},
    {"opt_name": "galore", "opt_kwargs": {"learning_rate": 1e-2, **RANK}},
    {"opt_name": "fira", "opt_kwargs": {"learning_rate": 1e-2, **RANK}},
)
TABLE = tuple({**line, "wrapper_name": None, "wrapper_kwargs": None} for line in RECIPES)


def contrib_suite():
    """A private copy of the suite's module whose every table is ours."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    if spec is None:
        pytest.skip("this optax was installed without its tests", allow_module_level=True)
    module = importlib.util.module_from_spec(spec)

    def product(*tables, **grid):
        return original(*(TABLE for _ in tables), **grid)

    original = parameterized.product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameterized, "product", product)
        spec.loader.exec_module(module)
    module._get_opt_factory = functools.partial(getattr, oxs)
    return module


ContribTest = contrib_suite().ContribTest


def test_our_recipes_are_what_is_tested():
    names = [name for name, _ in inspect.getmembers(ContribTest, inspect.isfunction)]
    for property_ in ("accept_extra_args", "preserve_dtype", "gradient_accumulation"):
        assert sum(property_ in name for name in names) in (len(TABLE), 2 * len(TABLE))
