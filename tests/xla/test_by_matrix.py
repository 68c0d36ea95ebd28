"""Factorisations of batches of matrices: the same numbers, and no program that can hang."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_structured as oxs
from optax_structured.xla.by_matrix import by_matrix

LAPACK = re.compile(r"@lapack_\w+\(.*: \(tensor<((?:\d+x)*)f\d+>")


@pytest.fixture
def one_device(monkeypatch):
    """With the eight of the other tests, batches stay whole."""
    monkeypatch.setattr(jax, "local_device_count", lambda backend: 1)


def gradient(f):
    return jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4), (0, 5, 4)], ids=str)
def test_by_matrix_is_the_function_on_the_batch(shape):
    x = jax.random.normal(jax.random.key(0), shape)

    def all_at_once(x):
        return jnp.linalg.svd(x, compute_uv=False)

    def one_by_one(x):
        return by_matrix(all_at_once, x)

    np.testing.assert_allclose(one_by_one(x), all_at_once(x), rtol=1e-5)
    np.testing.assert_allclose(gradient(one_by_one)(x), gradient(all_at_once)(x), atol=1e-5)
    members = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(one_by_one)(members), all_at_once(members), rtol=1e-5)


def cpu_calls(f, *args):
    """The shapes of the first operands of all LAPACK calls in the program of a CPU."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    return [shape.split("x")[:-1] for shape in LAPACK.findall(text)]


PROJECTORS = [
    oxs.SVD(),
    oxs.projectors.TwoSided(),
    oxs.RandomizedRange(),
    oxs.SubspaceIteration(),
    oxs.SubspaceIteration(orthonormalize="cholesky"),
]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("ensemble", [False, True], ids=["alone", "vmap"])
@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
def test_refits_hand_matrices_to_lapack_one_by_one(projector, ensemble):
    # jaxlib waits for a batch on a thread that the batch may need: programs hung.
    optimizer = oxs.galore(0.1, oxs.LowRank(2, period=1, projector=projector))
    params = {"stack": jnp.ones((3, 8, 6))}
    state, update = optimizer.init(params), optimizer.update
    if ensemble:
        update = jax.vmap(update)
        params, state = jax.tree.map(lambda x: jnp.stack([x, x]), (params, state))
    calls = cpu_calls(update, params, state, params)
    assert calls and all(len(shape) == 2 for shape in calls), calls


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("method", ["value", "support", "prox"])
def test_nuclear_norms_do_as_well(method):
    spec = oxs.NuclearNorm(axes=oxs.Axes(rows=-2, cols=-1))
    arguments = {"value": (), "support": (), "prox": (1.0, 0.1)}[method]
    calls = cpu_calls(lambda w: getattr(spec, method)(w, *arguments), jnp.ones((3, 8, 6)))
    assert calls and all(len(shape) == 2 for shape in calls), calls
