"""M-FAC: the published runs and products, and what the inverse of the Fisher matrix implies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import GOLDEN, IHVP, NEWEST_GRADIENT, assert_close

import optax_structured as oxs
from optax_structured.curvature import empirical_fisher_ihvp, mfac, scale_by_mfac

FILES = names("m_fac-")


def nonzero(params):
    return jax.tree.map(lambda p: p != 0, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n for n in FILES if "steps" in load(n).meta])
def test_golden_run(name):
    golden = load(name)
    h = golden.settings()
    optimizer = mfac(
        h["lr"],
        h["ngrads"],
        h["damp"],
        momentum=h["momentum"],
        weight_decay=h["weight_decay"],
        mask=nonzero if h["sparse"] else None,
    )

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    start = jax.tree.map(jnp.asarray, golden.start)
    run = jax.jit(lambda start, grads: jax.lax.scan(step, (start, optimizer.init(start)), grads))
    _, (path, moves) = run(start, jax.tree.map(jnp.asarray, golden.leaves("grads")))
    for leaf, published in golden.leaves("params").items():
        assert_close(path[leaf], published, GOLDEN)
    order = golden.meta.get("leaf_order", list(golden.start))
    flat = np.concatenate(
        [np.reshape(moves[leaf], (golden.meta["steps"], -1)) for leaf in order], 1
    )
    assert_close(-flat / h["lr"], golden.arrays["state/direction/flat"], GOLDEN)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n for n in FILES if "steps" not in load(n).meta])
def test_golden_products(name):
    golden = load(name)
    grads, x = (jnp.asarray(golden.arrays[f"inputs/{key}"]) for key in ("grads", "x"))
    out, damping = golden.leaves("outputs"), golden.meta["damp"]
    for kind, size in (("full", None), ("block", golden.meta["blocksize"])):
        inverse = empirical_fisher_ihvp(grads, damping, block_size=size)
        assert_close(jax.vmap(inverse)(x), out[f"{kind}_ihvp"], IHVP)
        assert_close(inverse.diagonal(), out[f"{kind}_diag"], IHVP)
    pivots = empirical_fisher_ihvp(grads, damping).pivots()[0]
    np.testing.assert_allclose(pivots, out["denom"], rtol=IHVP)


def gradients(steps, dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(0))
    g = {"w": jax.random.normal(keys[0], (steps, 3, 2), dtype)}
    g |= {"b": jax.random.normal(keys[1], (steps, 2), dtype)}
    return jax.tree.map(lambda x: scale * x, g)


def directions(element, grads):
    state = element.init(jax.tree.map(lambda g: g[0], grads))
    step = lambda state, g: element.update(g, state)[::-1]  # noqa: E731
    return jax.jit(lambda s, g: jax.lax.scan(step, s, g))(state, grads)


def flat(tree):
    return np.concatenate([np.reshape(tree[k], (len(tree[k]), -1)) for k in ("w", "b")], 1)


@pytest.mark.slow
@pytest.mark.parametrize("block", ["all", "leaf"])
def test_equals_the_dense_inverse(block, x64):
    """Over a window that has wrapped around; zeros before it is full."""
    m, damping, steps = 3, 0.05, 5
    grads = gradients(steps, jnp.float64)
    _, found = directions(scale_by_mfac(m, damping, block=block), grads)
    found, g = flat(found), flat(grads)
    parts = [slice(0, 6), slice(6, 8)] if block == "leaf" else [slice(0, 8)]
    for t in range(steps):
        rows = g[max(0, t - m + 1) : t + 1]
        for part in parts:
            F = damping * np.eye(rows[:, part].shape[1]) + rows[:, part].T @ rows[:, part] / m
            expected = np.linalg.solve(F, g[t, part])
            np.testing.assert_allclose(found[t, part], expected, rtol=1e-9)
    if block == "all":
        assert np.all(np.sum(found * g, 1) <= m)
        first = g[0] / (damping + g[0] @ g[0] / m)
        np.testing.assert_allclose(found[0], first, rtol=1e-12)


@pytest.mark.slow
def test_units(x64):
    """Gradients times c and damping times c^2 divide directions by c; large damping is SGD."""
    grads = gradients(4, jnp.float64)
    _, plain = directions(scale_by_mfac(3, 0.1), grads)
    _, scaled = directions(scale_by_mfac(3, 10.0), jax.tree.map(lambda g: 10 * g, grads))
    assert_close(flat(scaled) * 10, flat(plain), 1e-10)
    same = jax.tree.map(lambda g: jnp.broadcast_to(g[0], g.shape), grads)  # all of the window
    _, repeated = directions(scale_by_mfac(3, 0.1), same)
    g = flat(same)[-1]
    np.testing.assert_allclose(flat(repeated)[-1], g / (0.1 + g @ g), rtol=1e-10)
    _, damped = directions(scale_by_mfac(3, 1e12), grads)
    assert_close(flat(damped) * 1e12, flat(grads), 1e-9)


@pytest.mark.slow
def test_float32_keeps_its_digits_at_small_damping():
    exact = []
    with jax.enable_x64(True):
        exact = flat(directions(scale_by_mfac(8, 1e-5), gradients(10, jnp.float64))[1])
    with jax.enable_x64(True):
        narrow = jax.tree.map(lambda g: g.astype(jnp.float32), gradients(10, jnp.float64))
    found = flat(directions(scale_by_mfac(8, 1e-5), narrow)[1])
    assert_close(found, exact, NEWEST_GRADIENT)


@pytest.mark.slow
def test_a_gradient_with_nan_does_not_enter_the_window():
    grads = gradients(4)
    bad = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads)
    rest = jax.tree.map(lambda g: g[jnp.array([0, 2, 3])], grads)
    element = scale_by_mfac(3, 0.1, momentum=0.5)
    state, found = directions(element, bad)
    clean, expected = directions(element, rest)
    assert np.all(np.isnan(flat(found)[1]))
    np.testing.assert_allclose(flat(found)[[0, 2, 3]], flat(expected), rtol=1e-6)
    np.testing.assert_array_equal(state.window["w"], clean.window["w"])


def test_masked_entries_stay_and_count_for_nothing():
    grads = gradients(3)
    params = {"w": jnp.ones((3, 2)).at[0].set(0.0), "b": jnp.ones(2)}
    element = scale_by_mfac(2, 0.1, mask=nonzero)
    update = jax.jit(element.update)
    state, other = element.init(params), element.init(params)
    for t in range(3):
        g = jax.tree.map(lambda x: x[t], grads)  # noqa: B023
        u, state = update(g, state)
        v, other = update(g | {"w": g["w"].at[0].mul(100)}, other)
        np.testing.assert_array_equal(u["w"][0], 0)
        np.testing.assert_array_equal(u["w"], v["w"])


def test_memory_is_m_copies_one_for_momentum_and_k():
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    counters = 2 * 4
    for momentum, copies in ((0.0, 5), (0.9, 6)):
        held = oxs.state_bytes(scale_by_mfac(5, momentum=momentum), params)
        assert held == copies * 8 * 4 + 5 * 5 * 4 + counters
    state = scale_by_mfac(5, window_dtype=jnp.bfloat16).init(params)
    assert state.window["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: scale_by_mfac(0), "num_grads must be a whole number above 0"),
        (lambda: scale_by_mfac(2, 0.0), "damping must be a finite number above 0"),
        (lambda: scale_by_mfac(2, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: scale_by_mfac(2, block="row"), "block must be 'all' or 'leaf'"),
        (lambda: empirical_fisher_ihvp(jnp.ones((2, 2)), 0.0), "damping must be above 0"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
