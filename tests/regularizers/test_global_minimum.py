"""Brute force: nothing on a fine grid lies below the minimiser, in one and two dimensions."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_structured import regularizers as r

ENTRY = {
    r.L1(): abs,
    r.ElasticNet(l2=0.7): lambda z: abs(z) + 0.35 * z**2,
    r.L0(): lambda z: (z != 0).astype(float),
    r.LHalf(): lambda z: abs(z) ** (1 / 2),
    r.LTwoThirds(): lambda z: abs(z) ** (2 / 3),
    r.MCP(0.5, 3.0): lambda z: _integral(z, lambda s: np.maximum(0.5 - s / 3.0, 0)),
    r.SCAD(0.5, 3.7): lambda z: _integral(z, lambda s: np.clip((1.85 - s) / 2.7, 0, 0.5)),
    r.Box(-0.6, 0.9): lambda z: np.where((-0.6 <= z) & (z <= 0.9), 0, np.inf),
    r.NonNegative(): lambda z: np.where(z >= 0, 0, np.inf),
    r.DistanceToSign(): lambda z: abs(abs(z) - 1),
}
powers = st.floats(-3, 3).map(lambda x: 10**x)


def _integral(z, slope):
    """A penalty from its slope: independent of the closed form. Exact for piecewise-linear slopes
    up to the trapezia that hold a kink."""
    top = np.max(np.abs(z), initial=0)
    s = np.unique(np.concatenate([np.linspace(0, top, 20001), [0.5, 1.5, 1.85]]))
    f = np.concatenate([[0], np.cumsum((slope(s)[1:] + slope(s)[:-1]) / 2 * np.diff(s))])
    return np.interp(np.abs(z), s, f)


NAMES = {"ids": lambda x: "" if callable(x) else repr(x)}


@pytest.mark.slow
@pytest.mark.parametrize(("regularizer", "penalty"), ENTRY.items(), **NAMES)
@given(u=powers, sign=st.sampled_from([-1, 1]), metric=powers, strength=powers)
@settings(max_examples=40, deadline=None)
def test_entries(regularizer, penalty, u, sign, metric, strength):
    u = sign * u
    with jax.enable_x64(True):
        w = np.asarray(regularizer.prox(np.array([u]), metric, strength))
        value = float(regularizer.value(w))
    grid = np.linspace(-1, 1, 2001)
    z = np.concatenate([w, grid * abs(u), grid, [-0.6, 0.9]])
    penalties = penalty(z)
    assert value == pytest.approx(penalties[0], rel=1e-5, abs=1e-12)
    objective = metric / 2 * (z - u) ** 2 + strength * penalties
    assert objective[0] <= np.min(objective) * (1 + 1e-5)


GROUP = [
    r.GroupLasso(1),
    r.NonNegativeGroupLasso(1),
    r.SparseGroupLasso(1, l1_ratio=0.4),
    r.GroupL0(1),
    r.GroupMCP(1, threshold=0.5, gamma=3.0),
    r.GroupMCP(1, threshold=2.0, gamma=0.5, weight=1.0),
]


@functools.partial(jax.jit, static_argnums=0)
def prox(regularizer, u, metric, strength):
    return regularizer.prox(u, metric, strength)


@functools.partial(jax.jit, static_argnums=0)
def values(regularizer, candidates):
    return jax.vmap(regularizer.value)(candidates)


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", GROUP, ids=repr)
@given(u=st.tuples(powers, powers), metric=st.tuples(powers, powers), strength=powers)
@settings(max_examples=60, deadline=None)
def test_groups_of_two(regularizer, u, metric, strength):
    u, metric = (np.array(x)[:, None] for x in (u, metric))
    with jax.enable_x64(True):
        w = np.asarray(prox(regularizer, u, metric, strength))
        # The minimiser lies in the box spanned by 0 and u; the grid is finer near both ends, where
        # minimisers of wide metrics crowd.
        t = np.concatenate([[0], np.logspace(-6, 0, 60)])
        t = np.unique(np.concatenate([t, 1 - t]))
        grid = np.stack(np.meshgrid(t * u[0], t * u[1])).reshape(2, -1)
        z = np.concatenate([w, grid], axis=1)
        value = np.asarray(values(regularizer, z.T[..., None]))
    objective = np.sum(metric / 2 * (z - u) ** 2, axis=0) + strength * value
    assert objective[0] <= np.min(objective) * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regularizer", "u", "metric", "strength"),
    [
        (r.L0(), 2.0, 1.0, 2.0),
        (r.GroupL0(1, weight=1.0), 2.0, 1.0, 2.0),
        (r.MCP(1.0, 1.0), 2.0, 1.0, 4.0),  # two valleys, equally deep
        (r.GroupMCP(1, threshold=1.0, gamma=1.0, weight=1.0), 2.0, 1.0, 4.0),
        (r.L1(), 2.0, 1.0, 2.0),
        (r.GroupLasso(1, weight=1.0), 2.0, 1.0, 2.0),
    ],
    ids=repr,
)
def test_ties_go_to_zero(regularizer, u, metric, strength):
    leaf = np.array([[u], [0.0]])
    with jax.enable_x64(True):
        assert np.all(regularizer.prox(leaf, metric, strength) == 0)
        assert np.any(regularizer.prox(leaf * (1 + 1e-9), metric, strength) != 0)
