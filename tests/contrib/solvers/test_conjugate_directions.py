"""Conjugate directions: the published runs, conjugate gradients, derivatives of the solution."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import load, names
from tolerances import GOLDEN

from optax_structured.contrib.solvers import conjugate_directions


def direction_of(golden, w):
    """The map that the file writes, such as `q=tanh(3 W r/||r||)`; r comes with norm 1."""
    text = golden.meta["direction_map"].removeprefix("q=").replace("r/||r||", "r")
    text = re.sub(r"\bW r\b", "(W @ r)", text)
    text = re.sub(r"(\d) (?=[a-z(])", r"\1 * ", text)
    code = compile(text, golden.name, "eval")
    return lambda r: eval(code, {"tanh": jnp.tanh, "sin": jnp.sin, "W": w, "r": r})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("deep_conjugate_direction-"))
def test_golden(name):
    golden = load(name)
    meta = golden.meta
    a, b, w = (jnp.asarray(golden.arrays[f"inputs/{key}"]) for key in "AbW")
    found = conjugate_directions(
        lambda x: a @ x,
        b,
        direction_of(golden, w),
        window=meta["orthogonalisation_window"],
        rtol=meta["tol_relative"],
        max_steps=meta["max_it"],
    )
    norms = golden.arrays["outputs/residual_norms"]
    assert found.steps == len(norms) - 1
    np.testing.assert_allclose(
        found.residual_norms[: len(norms)], norms, atol=GOLDEN * norms[0], rtol=GOLDEN
    )
    assert np.all(np.isnan(found.residual_norms[len(norms) :]))
    np.testing.assert_allclose(found.x, golden.arrays["outputs/x"], atol=GOLDEN)


def system(n=8, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, n))
    return jnp.asarray(root @ root.T + np.eye(n)), jnp.asarray(rng.standard_normal(n))


def test_limiting_cases(x64):
    """The inverse takes one step; the identity takes those of conjugate gradients, from any x0."""
    a, b = system()
    solve = jax.jit(lambda direction_matrix, x0: conjugate_directions(
        lambda x: a @ x, b, lambda r: direction_matrix @ r, x0=x0, rtol=1e-10, max_steps=30
    ))  # fmt: skip
    assert solve(jnp.linalg.inv(a), 0 * b).steps == 1
    for x0 in (0 * b, 10 * jnp.ones(8)):
        found = solve(jnp.eye(8), x0)
        assert found.steps <= 9
        np.testing.assert_allclose(found.x, jnp.linalg.solve(a, b), rtol=1e-8)
    assert solve(jnp.eye(8), jnp.linalg.solve(a, b)).residual_norms[0] < 1e-12
    # Errors go down in the A-norm for any direction.
    odd = conjugate_directions(
        lambda x: a @ x, b, lambda r: jnp.sign(r) + 0.1, window=1, max_steps=20, rtol=1e-3
    )
    assert jnp.linalg.norm(a @ odd.x - b) <= 1e-3 * jnp.linalg.norm(b) or odd.steps == 20


@pytest.mark.slow
def test_derivatives_trees_and_zero(x64):
    a, b = system()

    def loss(a, b):
        tree = {"x": b[:3], "y": b[3:].reshape(1, 5)}
        flat = lambda t: jnp.concatenate([t["x"], t["y"][0]])  # noqa: E731
        back = lambda v: {"x": v[:3], "y": v[3:][None]}  # noqa: E731
        found = conjugate_directions(
            lambda t: back(a @ flat(t)), tree, lambda r: r, rtol=1e-12, max_steps=30
        )
        return jnp.sum(jnp.sin(flat(found.x)))

    got = jax.grad(loss, argnums=(0, 1))(a, b)
    want = jax.grad(lambda a, b: jnp.sum(jnp.sin(jnp.linalg.solve(a, b))), argnums=(0, 1))(a, b)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    many = jax.vmap(lambda b: conjugate_directions(lambda x: a @ x, b, lambda r: r).x)
    np.testing.assert_allclose(many(jnp.stack([b, 0 * b]))[1], 0.0)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="window must be at least 1 direction, got 0"):
        conjugate_directions(lambda x: x, jnp.ones(2), lambda r: r, window=0)
