"""Leaves that are alike share one trace of their refit, and keep subspaces of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes_table import normal_tree

import optax_structured as oxs
from optax_structured.low_rank import refit

SHAPES = {"a": (8, 6), "b": (8, 6), "c": (6, 8), "d": (8, 6)}


@pytest.fixture
def traces(monkeypatch):
    """The shapes of the leaves whose fit is traced."""
    jax.clear_caches()
    seen, fit = [], refit._fit

    def counting(spec, frame, *args):
        seen.append(frame.shape)
        return fit(spec, frame, *args)

    monkeypatch.setattr(refit, "_fit", counting)
    return seen


def after_two_refits(spec, params):
    optimizer = oxs.galore(0.1, spec)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for step in range(2):
        grads = {name: (step + 1) * x for name, x in params.items()}
        updates, state = update(grads, state, params)
    return updates


def test_one_trace_a_shape(traces):
    after_two_refits(oxs.LowRank(2, period=1), normal_tree("params", SHAPES))
    assert traces == [(8, 6), (6, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("projector", [oxs.SubspaceIteration(), oxs.RandomizedRange(), oxs.SVD()])
def test_each_leaf_is_fitted_to_its_own_gradient(projector):
    """And begins at numbers of its own: what else is in the tree does not matter."""
    params, spec = normal_tree("params", SHAPES), oxs.LowRank(2, period=1, projector=projector)
    together = after_two_refits(spec, params)
    for name, leaf in params.items():
        alone = after_two_refits(spec, {name: leaf})
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-5, atol=1e-7)


def test_random_projections_differ_from_leaf_to_leaf(traces):
    spec = oxs.LowRank(2, period=1, projector=oxs.RandomProjection())
    same = dict.fromkeys("ab", normal_tree("params", SHAPES)["a"])
    updates = after_two_refits(spec, same)
    assert traces == [(8, 6)]
    assert not np.allclose(updates["a"], updates["b"])


@dataclasses.dataclass(frozen=True)
class FirstOrSecond(oxs.SVD):
    """One of a user's own, which asks which leaf it is at."""

    def init(self, frame, dtype, name):
        axis = ["first", "second"].index(name)
        return jnp.eye(frame.size, dtype=dtype)[axis : axis + 1]

    def refit(self, step):
        return step.basis, step.due


def test_a_projector_of_a_users_own_is_told_the_names():
    params = {name: jnp.ones((4, 6)) for name in ("first", "second")}
    updates = after_two_refits(oxs.LowRank(1, period=1, projector=FirstOrSecond()), params)
    for axis, name in enumerate(params):
        touched = jnp.any(updates[name] != 0.0, axis=1)
        assert jnp.array_equal(touched, jnp.arange(4) == axis)
