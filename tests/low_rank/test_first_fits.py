"""New subspaces are fitted at each of their first steps; gradients that cannot be used wait."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import unavoidable
from recipes_table import normal

import optax_structured as oxs
from optax_structured import SVD, LowRank, SubspaceIteration

SHAPES = {"tall": (12, 8), "wide": (8, 12), "stack": (3, 8, 12)}
PROJECTORS = [
    SVD(),
    SubspaceIteration(),
    SubspaceIteration(iterations=2, first_fits=1),
    pytest.param(SubspaceIteration(orthonormalize="cholesky"), marks=pytest.mark.slow),
]


def gradients(steps=9):
    """Some leaves, and matrices of the stack, cannot be fitted at first or at a refit."""
    grads = [
        {name: normal((name, t), shape) for name, shape in SHAPES.items()} for t in range(steps)
    ]
    grads[0]["tall"] = jnp.zeros_like(grads[0]["tall"])
    grads[0]["stack"] = grads[0]["stack"].at[1].set(jnp.nan)
    grads[5]["wide"] = grads[5]["wide"].at[3, 4].set(jnp.inf)
    grads[5]["stack"] = grads[5]["stack"].at[2].set(0.0)
    return grads


def projection(projector, period=5):
    spec = LowRank(3, period, projector=projector)
    return oxs.low_rank_projection(optax.scale_by_adam(), spec)


def trajectory(projector):
    tx, grads = projection(projector), gradients()
    state, update, seen = tx.init(grads[0]), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state)
        seen.append((updates, state))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
def test_each_matrix_has_its_first_fits_and_then_waits_for_the_rule(projector):
    first = projector.first_fits
    bases = [projection(projector).init(gradients()[0]).bases]
    bases += [state.bases for _, state in trajectory(projector)]

    def moved(pick):
        pairs = zip(map(pick, bases), map(pick, bases[1:]), strict=False)
        return [t for t, (a, b) in enumerate(pairs) if not np.array_equal(a, b)]

    assert moved(lambda b: b["tall"]) == [*range(1, 1 + first), 5]
    assert moved(lambda b: b["wide"]) == [*range(first)]
    assert moved(lambda b: b["stack"][0]) == [*range(first), 5]
    assert moved(lambda b: b["stack"][1]) == [*range(1, 1 + first), 5]
    assert moved(lambda b: b["stack"][2]) == [*range(first)]


def test_the_state_counts_what_is_missing():
    states = [state.refresh for _, state in trajectory(SubspaceIteration())]
    assert [int(s["tall"].missing) for s in states[:5]] == [3, 2, 1, 0, 0]
    assert [s["stack"].missing.tolist() for s in states[:3]] == [[2, 3, 2], [1, 2, 1], [0, 1, 0]]
    assert states[0]["stack"].missing.dtype == jnp.int8


def test_the_first_fits_come_close_to_an_svd():
    spectrum = 0.8 ** jnp.arange(24)
    left, right = (jnp.linalg.qr(normal(i, (n, 24)))[0] for i, n in enumerate((24, 40)))
    gradient = (left * spectrum) @ right.T
    tx = projection(SubspaceIteration(), period=100)
    state, update, held = tx.init(gradient), jax.jit(tx.update), []
    best = jnp.linalg.norm(spectrum[:3])
    for _ in range(5):
        _, state = update(gradient, state)
        held.append(float(jnp.linalg.norm(state.bases[""] @ gradient) / best))
    assert held[0] < held[1] < held[2] == held[3] == held[4]
    assert held[2] > 0.99


def test_no_step_but_a_refit_factorises():
    tx, grads = projection(SubspaceIteration(), 20), gradients()[1]
    text = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
    assert "lapack" in text
    assert not unavoidable(text, "lapack")


def test_narrow_gradients_are_widened_in_a_refit_only():
    tx = oxs.low_rank_projection(optax.identity(), LowRank(16, 20, dtype="bfloat16"))
    grads = jax.ShapeDtypeStruct((32, 96), jnp.bfloat16)
    state = jax.eval_shape(tx.init, grads)
    text = jax.jit(tx.update).lower(grads, state).compile().as_text()
    sides = re.search(r" conditional\(.*branch_computations=\{(.*?)\}", text)[1].split(", ")
    (arguments,) = (
        line for line in text.splitlines() if line.startswith(f"{sides[1]} (")
    )  # of the side that fits
    assert "bf16[32,96]" in arguments
    assert " f32[32,96]" not in arguments


def test_a_refit_of_ones_own_is_not_passed_over():
    class Leading(SubspaceIteration):
        def refit(self, step):
            return SVD().refit(step)

    # All are fitted after the third step; before, they are what each starts at.
    leading, svd = (trajectory(projector)[3:] for projector in (Leading(first_fits=1), SVD()))
    for a, b in zip(*map(jax.tree.leaves, (leading, svd)), strict=True):
        np.testing.assert_array_equal(a, b)
