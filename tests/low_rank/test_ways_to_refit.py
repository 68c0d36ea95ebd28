"""A refit is a conditional, on one CPU device a loop that mostly takes no turn: the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import unavoidable
from recipes_table import normal
from tolerances import reordered

import optax_structured as oxs
from optax_structured import SVD, LowRank, SubspaceIteration

SHAPES = {"tall": (12, 8), "wide": (8, 12), "also wide": (8, 12), "stack": (3, 8, 12)}
PROJECTORS = [
    SubspaceIteration(),
    SubspaceIteration(iterations=2, cold_iterations=1),
    pytest.param(SubspaceIteration(orthonormalize="cholesky"), marks=pytest.mark.slow),
]


@pytest.fixture(params=["loop", "conditional"])
def way(request, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: {"loop": 1, "conditional": 8}[request.param])
    return request.param


def gradients(steps=6, dtype=jnp.float32):
    """Some leaves, and matrices of the stack, cannot be fitted at first or at a refit."""
    grads = [
        {name: normal((name, t), shape, dtype) for name, shape in SHAPES.items()}
        for t in range(steps)
    ]
    grads[0]["tall"] = jnp.zeros_like(grads[0]["tall"])
    grads[0]["stack"] = grads[0]["stack"].at[1].set(jnp.nan)
    grads[2]["wide"] = grads[2]["wide"].at[3, 4].set(jnp.inf)
    grads[4]["stack"] = grads[4]["stack"].at[2].set(0.0)
    return grads


def trajectory(projector, grads, **parts):
    tx = oxs.low_rank_projection(optax.scale_by_adam(), LowRank(3, 2, projector=projector, **parts))
    state, update, seen = tx.init(grads[0]), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state)
        seen.append((updates, state))
    return seen


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
def test_both_ways_are_the_same(projector, dtype, monkeypatch):
    grads, found = gradients(dtype=dtype), []
    for devices in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        found.append(trajectory(projector, grads))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=reordered(dtype), atol=reordered(dtype))


@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
def test_what_cannot_be_fitted_waits_and_keeps(projector, way):
    states = [state for _, state in trajectory(projector, gradients())]
    start = oxs.low_rank_projection(optax.scale_by_adam(), LowRank(3, 2, projector=projector)).init(
        gradients()[0]
    )
    fitted = [state.refresh for state in states]
    assert not fitted[0]["tall"].fitted
    assert fitted[1]["tall"].fitted  # at the next step, though none is due
    assert fitted[0]["stack"].fitted.tolist() == [True, False, True]
    assert fitted[1]["stack"].fitted.all()
    kept = [
        (start.bases["tall"], states[0].bases["tall"]),
        (start.bases["stack"][1], states[0].bases["stack"][1]),
        (states[0].bases["stack"][0], states[1].bases["stack"][0]),  # while the second was fitted
        (states[1].bases["wide"], states[2].bases["wide"]),
        (states[3].bases["stack"][2], states[4].bases["stack"][2]),
    ]
    for before, after in kept:
        np.testing.assert_array_equal(before, after)
    moved = [
        (states[1].bases["wide"], states[4].bases["wide"]),
        (states[1].bases["also wide"], states[2].bases["also wide"]),
        (states[3].bases["stack"][0], states[4].bases["stack"][0]),
    ]
    for before, after in moved:
        assert not np.allclose(before, after)


@pytest.mark.parametrize("members", [None, 2])
def test_no_step_but_a_refit_factorises(way, members):
    """An ensemble neither."""
    tx = oxs.low_rank_projection(optax.scale_by_adam(), LowRank(3, 20))
    update, grads = tx.update, gradients()[1]
    state = tx.init(grads)
    if members:
        grads, state = jax.tree.map(lambda x: jnp.stack([x] * members), (grads, state))
        update = jax.vmap(update)
    text = jax.jit(update).lower(grads, state).compile().as_text()
    assert "lapack" in text
    assert not unavoidable(text, "lapack")
    assert (" conditional(" in text) == (way == "conditional")


def test_narrow_gradients_are_widened_in_the_loop_and_not_before_it(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    tx = oxs.low_rank_projection(optax.identity(), LowRank(16, 20, dtype="bfloat16"))
    grads = jax.ShapeDtypeStruct((32, 96), jnp.bfloat16)
    state = jax.eval_shape(tx.init, grads)
    text = jax.jit(tx.update).lower(grads, state).compile().as_text()
    (loop,) = (line for line in text.splitlines() if " while(" in line)
    assert "bf16[32,96]" in loop
    assert " f32[32,96]" not in loop


def test_a_refit_of_ones_own_is_not_passed_over(way):
    class Leading(SubspaceIteration):
        def refit(self, *args):
            return SVD().refit(*args)

    class Renamed(SubspaceIteration):
        pass

    assert Renamed().idles
    assert not Leading().idles
    # All are fitted after the second step; before, they are what each starts at.
    found = (trajectory(projector, gradients())[1:] for projector in (Leading(), SVD()))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)
