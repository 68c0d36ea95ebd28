"""BSVRB and MSVR: the reference trajectories, and what they are when all blocks are seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from tolerances import GOLDEN, reordered

import optax_structured as oxs
from optax_structured.contrib.bilevel import bsvrb, msvr

FILES = sorted(path.stem for path in FOLDER.glob("bsvrb-*.npz"))


def quadratic(mu_x):
    """The problem of the files: a batch is the mean over its samples."""

    def lower(x, y, batch):
        q, b, c = batch
        each = 0.5 * jnp.einsum("d,jde,e->j", y, q, y) - (x @ b + c) @ y
        return jnp.mean(each)

    def upper(x, y, batch):
        t, c = batch
        return 0.5 * jnp.mean(jnp.sum((y - t) ** 2, -1) + mu_x * jnp.sum((x - c) ** 2, -1))

    return upper, lower


def problem(golden):
    inputs = {key: jnp.asarray(value) for key, value in golden.leaves("inputs").items()}
    lower = inputs["Q"], inputs["B"], inputs["b"]
    return inputs, (inputs["t"], inputs["C"]), lower


@pytest.mark.parametrize("name", FILES)
def test_golden(name, x64):
    golden = load(name)
    meta, h = golden.meta, golden.hyperparameters
    inputs, upper_data, lower_data = problem(golden)
    solver = bsvrb(
        *quadratic(h["mu_x"]),
        num_blocks=meta["m"],
        blocks_per_step=meta["blocks_per_step"],
        version=meta["version"],
        **{key: h[key] for key in ("alpha", "alpha_bar", "beta", "tau", "tau_v")},
        **{key: h[key] for key in ("gamma", "gamma_bar", "mu", "v_bound")},
    )
    x, y = (jnp.asarray(golden.start[key]) for key in "xy")
    optimizer = optax.sgd(h["eta"])

    def step(carry, samples):
        x, state, opt_state = carry
        blocks, train, val = samples
        rows = lambda data, index: tuple(a[blocks[:, None], index] for a in data)  # noqa: E731
        z, state = solver.estimate(x, state, blocks, rows(upper_data, val), rows(lower_data, train))
        updates, opt_state = optimizer.update(z, opt_state)
        x = optax.apply_updates(x, updates)
        return (x, state, opt_state), (x, state)

    carry = (x, solver.init(x, y, upper_data, lower_data), optimizer.init(x))
    samples = tuple(inputs[key] for key in ("blocks", "train_idx", "val_idx"))
    xs, states = jax.jit(lambda c: jax.lax.scan(step, c, samples))(carry)[1]
    ours = {"x": xs, "y": states.y}
    ours |= {"z": states.z, "s": states.slope, "u": states.residual}
    ours |= {"H": states.inverse, "v": states.inverse}
    compared = golden.leaves("params") | {
        key.split("/")[0]: value for key, value in golden.leaves("state").items()
    }
    assert compared.keys() >= {"x", "y", "z", "s"}
    for key, want in compared.items():
        np.testing.assert_allclose(ours[key], want, atol=GOLDEN * np.abs(want).max(), err_msg=key)


def small(seed=0, m=4, samples=5, dy=3, dx=2):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    roots = draw(m, samples, dy, dy)
    q = jnp.einsum("mjde,mjfe->mjdf", roots, roots) + 0.5 * jnp.eye(dy)
    lower = q, draw(m, samples, dx, dy), draw(m, samples, dy)
    return draw(dx), draw(m, dy), (draw(m, samples, dy), draw(m, samples, dx)), lower


def exact_hypergradient(x, upper_data, lower_data, mu_x=0.1):
    """Of F by differentiating through the solutions of the lower level."""
    upper, _ = quadratic(mu_x)
    q, b, c = (jnp.mean(a, 1) for a in lower_data)

    def total(x):
        y = jax.vmap(jnp.linalg.solve)(q, jnp.einsum("d,mde->me", x, b) + c)
        return jnp.mean(jax.vmap(upper, (None, 0, 0))(x, y, upper_data))

    return jax.grad(total)(x), jax.vmap(jnp.linalg.solve)(q, jnp.einsum("d,mde->me", x, b) + c)


SHARES_ONE = {"alpha": 1.0, "alpha_bar": 1.0, "beta": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_all_blocks_and_shares_of_one_are_alternating_descent(version, x64):
    """From exact lower solutions: z is the true hypergradient, and y moves by exact gradients."""
    x, _, upper_data, lower_data = small()
    want, y = exact_hypergradient(x, upper_data, lower_data)
    solver = bsvrb(
        *quadratic(0.1),
        num_blocks=4,
        blocks_per_step=4,
        version=version,
        mu=1e-6,
        v_bound=1e6,
        tau=0.1,
        **SHARES_ONE,
    )
    state = solver.init(x, y, upper_data, lower_data)
    np.testing.assert_allclose(state.z, want, rtol=1e-9)
    moved = x + 0.1
    z, state = jax.jit(solver.estimate)(moved, state, jnp.arange(4), upper_data, lower_data)
    slope = jax.vmap(jax.grad(quadratic(0.1)[1], argnums=1), (None, 0, 0))(moved, y, lower_data)
    np.testing.assert_allclose(state.y, y - 0.1 * slope, rtol=1e-9, atol=1e-12)
    v = jax.vmap(jnp.linalg.solve)(
        jnp.mean(lower_data[0], 1),
        jax.vmap(jax.grad(quadratic(0.1)[0], argnums=1), (None, 0, 0))(x, y, upper_data),
    )
    b = jnp.mean(lower_data[1], 1)
    direct = 0.1 * (moved - jnp.mean(upper_data[1], (0, 1)))
    np.testing.assert_allclose(z, direct + jnp.einsum("mde,me->d", b, v) / 4, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_without_noise_it_tracks_the_true_hypergradient(version, x64):
    """Two of four blocks a step, whole data each, to the optimum of x."""
    x, y, upper_data, lower_data = small()
    solver = bsvrb(
        *quadratic(0.1), num_blocks=4, blocks_per_step=2, version=version, mu=1e-3, v_bound=50.0,
        alpha=0.5, alpha_bar=0.5, beta=0.5, tau=0.03, tau_v=0.03,
    )  # fmt: skip

    def step(carry, key):
        x, state = carry
        blocks = jax.random.choice(key, 4, (2,), replace=False)
        rows = jax.tree.map(lambda a: a[blocks], (upper_data, lower_data))
        z, state = solver.estimate(x, state, blocks, *rows)
        return (x - 0.02 * z, state), None

    start = (x, solver.init(x, y, upper_data, lower_data))
    keys = jax.random.split(jax.random.key(0), 3000)
    (end, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))(start)
    first, _ = exact_hypergradient(x, upper_data, lower_data)
    last, solution = exact_hypergradient(end, upper_data, lower_data)
    assert jnp.linalg.norm(last) < 0.05 * jnp.linalg.norm(first)
    np.testing.assert_allclose(state.y, solution, atol=0.05)


@pytest.mark.slow
def test_beta_one_is_the_gradient_of_the_sampled_blocks(x64):
    """And v1 with the exact Hessian gives what v2 gives at its fixed point."""
    x, y, upper_data, lower_data = small()
    blocks = jnp.array([2, 0])
    rows = jax.tree.map(lambda a: a[blocks], (upper_data, lower_data))
    z = {}
    for version in ("v1", "v2"):
        for beta in (1.0, 0.3):
            solver = bsvrb(
                *quadratic(0.1),
                num_blocks=4,
                blocks_per_step=2,
                version=version,
                beta=beta,
                mu=1e-9,
                v_bound=1e9,
            )
            state = solver.init(x, y, upper_data, lower_data)
            z[version, beta], _ = solver.estimate(x, state, blocks, *rows)
    np.testing.assert_allclose(z["v1", 1.0], z["v2", 1.0], rtol=1e-8)
    np.testing.assert_allclose(z["v1", 0.3], z["v2", 0.3], rtol=1e-8)
    assert not np.allclose(z["v1", 1.0], z["v1", 0.3])


@pytest.mark.slow
def test_lazy_blocks_catch_up(x64):
    """A block seen after three steps takes three steps of y and of v along its new estimates."""
    x, y, upper_data, lower_data = small()
    make = functools.partial(
        bsvrb,
        *quadratic(0.1),
        num_blocks=4,
        blocks_per_step=1,
        alpha=0.5,
        alpha_bar=0.5,
        v_bound=1e6,
        tau=0.01,
        tau_v=0.01,
    )
    after, v = {}, {}
    for lazy in (False, True):
        solver = make(lazy=lazy)
        state = solver.init(x, y, upper_data, lower_data)
        for block in (0, 0, 1):
            before = state
            rows = jax.tree.map(lambda a, b=block: a[b : b + 1], (upper_data, lower_data))
            _, state = solver.estimate(x + 1.0, state, jnp.array([block]), *rows)
        after[lazy], v[lazy] = state.y[1] - before.y[1], state.inverse[1] - before.inverse[1]
    np.testing.assert_allclose(after[True], 3 * after[False], rtol=1e-9)
    np.testing.assert_allclose(v[True], 3 * v[False], rtol=1e-9)


@pytest.mark.slow
def test_eigenvalues_are_raised_and_v_stays_in_its_ball():
    x, y, upper_data, lower_data = (
        jax.tree.map(lambda a: a.astype(jnp.float32), part) for part in small()
    )
    tall = bsvrb(*quadratic(0.1), num_blocks=4, blocks_per_step=4, version="v1", mu=3.0)
    state = tall.init(x, y, upper_data, lower_data)
    _, state = tall.estimate(x, state, jnp.arange(4), upper_data, lower_data)
    assert jnp.min(jnp.linalg.eigvalsh(state.inverse)) > 3.0 - 1e-3
    short = bsvrb(*quadratic(0.1), num_blocks=4, blocks_per_step=4, v_bound=0.1)
    state = short.init(x, y, upper_data, lower_data)
    _, state = short.estimate(x, state, jnp.arange(4), upper_data, lower_data)
    np.testing.assert_allclose(jnp.linalg.norm(state.inverse, axis=1), 0.1, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(state._replace(clock=(), seen=()))} == {
        jnp.dtype("float32")
    }


BLOCKS = jnp.array([[0, 2], [1, 2], [3, 0], [2, 1]])


def test_msvr_recursion():
    grads, old = jax.random.normal(jax.random.key(0), (2, 4, 2, 3))
    tx = msvr(0.4, num_blocks=4, blocks_per_step=2)
    state, update = tx.init(jnp.zeros((4, 3))), jax.jit(tx.update)
    want, seen, gamma = np.zeros((4, 3)), set(), 2 / (2 * 0.6) + 0.6
    for blocks, g, h in zip(BLOCKS, grads, old, strict=True):
        got, state = update(g, state, grads_prev=h, blocks=blocks)
        for i, g_i, h_i in zip(map(int, blocks), g, h, strict=True):
            moved = 0.6 * want[i] + 0.4 * g_i + gamma * (g_i - h_i)
            want[i] = moved if i in seen else g_i
            seen.add(i)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_msvr_of_all_blocks_is_storm():
    grads, old = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    many, plain = msvr(0.4, num_blocks=4, blocks_per_step=4), oxs.transforms.storm(0.4)
    a, b = many.init(jnp.zeros((4, 2))), plain.init(jnp.zeros((4, 2)))
    for g, h in zip(grads, old, strict=True):
        ours, a = many.update(g, a, grads_prev=h, blocks=jnp.arange(4))
        theirs, b = plain.update(g, b, grads_prev=h)
        np.testing.assert_allclose(ours, theirs, rtol=reordered(jnp.float32), atol=1e-6)


def test_msvr_schedules():
    grads, old = jax.random.normal(jax.random.key(0), (2, 4, 2, 3))
    made = [
        msvr(0.4, 4, 2),
        msvr(optax.constant_schedule(0.4), 4, 2),
        optax.inject_hyperparams(msvr, static_args=("num_blocks", "blocks_per_step"))(0.4, 4, 2),
        msvr(0.4, 4, 2, gamma=2 / (2 * 0.6) + 0.6),
    ]
    ends = []
    for tx in made:
        state = tx.init(jnp.zeros((4, 3)))
        for blocks, g, h in zip(BLOCKS, grads, old, strict=True):
            got, state = tx.update(g, state, grads_prev=h, blocks=blocks)
        ends.append(got)
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-5)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="blocks_per_step must be from 1 to num_blocks=4, got 5"):
        msvr(0.5, 4, 5)
    with pytest.raises(ValueError, match="alpha=1 keeps nothing of a block"):
        msvr(1.0, 4, 2)
    tx = msvr(0.5, 4, 2)
    with pytest.raises(ValueError, match="msvr needs which blocks"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.ones((4, 3))))
    with pytest.raises(ValueError, match="version must be 'v1' or 'v2'"):
        bsvrb(*quadratic(0.1), num_blocks=4, blocks_per_step=2, version="v3")
    solver = bsvrb(*quadratic(0.1), num_blocks=4, blocks_per_step=2)
    with pytest.raises(ValueError, match=r"y must be of shape \(4, dy\)"):
        solver.init(jnp.ones(2), jnp.ones(3), None, None)
