"""Kernels of low rank become two factors wherever that takes fewer operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import assert_close, rounding

import optax_structured as oxs
from optax_structured.compact import compact
from optax_structured.weights import Factors


def low_rank(shape, rank, rows=-2, cols=-1, seed=0):
    """Random numbers whose matrix view has this rank."""
    axes, random = oxs.Axes(rows, cols), np.random.default_rng(seed)
    *batch, m, n = axes.matrix_shape(shape)
    left, right = random.normal(size=(*batch, m, rank)), random.normal(size=(*batch, rank, n))
    return axes.from_matrix(jnp.asarray(left @ right), shape)


def check(fn, params, *inputs, unroll=False):
    small = compact(fn, params, *inputs, unroll=unroll)
    made, expected = jax.jit(small.fn)(small.params, *inputs), fn(params, *inputs)
    jax.tree.map(lambda a, b: assert_close(a, b, 100 * rounding("float64")), made, expected)
    assert small.report.flops[1] < small.report.flops[0]
    return small


def x64(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        with jax.enable_x64():
            test(*args, **kwargs)

    return run


X = np.random.default_rng(1).normal(size=(4, 8))


@x64
def test_where_that_pays():
    params = {
        "wide": low_rank((8, 6), 2).at[:, 5].set(0),
        "narrow": low_rank((8, 3), 2),  # 2 (8 + 3) is less than 8 3
        "full": low_rank((8, 3), 3),
    }
    small = check(lambda p, x: (x @ p["wide"], x @ p["narrow"], x @ p["full"]), params, X)
    assert small.params["wide"].left.shape == (8, 2)
    assert small.params["wide"].shape == (8, 5)
    assert small.params["narrow"].shape == (8, 3)
    assert isinstance(small.params["full"], jax.Array)
    assert "of rank 2" in str(small.report)


@x64
def test_kernels_that_are_moved_before_they_are_read():
    def fn(p, x):
        x = x @ p["turned"].T + x @ p["window"].reshape(-1, 8)
        x = jnp.einsum("io,bi->ob", p["first"], x).T
        return jnp.einsum("bi,ihe->bhe", x, p["heads"].astype("float64"))

    params = {
        "turned": low_rank((8, 8), 2, seed=2),
        "window": low_rank((2, 4, 8), 2, (0, 1), seed=3),
        "first": low_rank((8, 8), 2, seed=4),
        "heads": low_rank((8, 2, 4), 2, 0, (1, 2), seed=5),
    }
    small = check(fn, params, X)
    for leaf in small.params.values():
        assert isinstance(leaf, Factors)


@x64
@pytest.mark.parametrize("unroll", [False, True], ids=["one body", "written out"])
def test_stacked_layers(unroll):
    def fn(p, x):
        def layer(x, kernels):
            up, down = kernels
            return x + jnp.tanh(x @ up) @ down, None

        return jax.lax.scan(layer, x, (p["up"], p["down"]))[0]

    # Unit 0 is dead in the first layer only.
    params = {"up": low_rank((2, 8, 12), 2), "down": low_rank((2, 12, 8), 3, seed=2)}
    params["down"] = params["down"].at[0, 0].set(0)
    small = check(fn, params, X, unroll=unroll)
    assert small.params["up"].left.shape == (2, 8, 2)
    assert small.params["down"].right.shape == (2, 3, 8)


@x64
def test_batches_of_kernels():
    params = {"experts": low_rank((3, 8, 6), 2), "shared": low_rank((8, 8), 2, seed=2)}

    def fn(p, x):
        rows = jnp.stack([x @ p["shared"], x, -x])
        return jnp.einsum("ebi,eio->beo", rows, p["experts"])

    small = check(fn, params, X)
    assert small.params["experts"].left.shape == (3, 8, 2)
    assert small.params["shared"].left.shape == (8, 2)


@x64
@pytest.mark.parametrize("split", ["after the window", "before it"])
def test_convolutions(split):
    rows, cols = ((0, 1, 2), 3) if split == "after the window" else (2, (0, 1, 3))
    params = {"kernel": low_rank((3, 3, 6, 5), 2, rows, cols)}

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    images = np.random.default_rng(1).normal(size=(2, 5, 4, 6))
    small = check(fn, params, images)
    assert small.params["kernel"].left.shape[-1] == 2
    wide = {"kernel": low_rank((3, 3, 6, 5), 5, rows, cols)}
    assert isinstance(compact(fn, wide, images).params["kernel"], jax.Array)


def test_a_table_that_is_looked_up_stays():
    params = {"embed": low_rank((8, 6), 1).astype("float32")}
    small = compact(lambda p, x: p["embed"][x] @ p["embed"].T, params, jnp.arange(3))
    assert small.params is params


def test_welore_and_a_merged_adapter():
    """A kernel that was cut to rank 2, and tuned with an adapter of rank 1, has rank 3."""
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.normal(size=(16, 16)))[0] for _ in range(2))
    s = np.array([4.0, 3.0, *np.full(14, 0.01)])
    params = {"mlp": {"kernel": jnp.asarray(u * s @ v, "float32")}}
    plan = oxs.weights.welore_plan(params, threshold=0.1)
    cut = oxs.weights.merge(oxs.weights.factorize(params, plan))
    adapter = oxs.adapters.init(jax.random.key(0), cut, oxs.adapters.LoRA(rank=1))
    adapter = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape), adapter)
    merged = oxs.adapters.merge(cut, adapter)
    x = jnp.asarray(X @ random.normal(size=(8, 16)), "float32")
    for tree, rank in ((cut, 2), (merged, 3)):
        fn = lambda p, x: x @ p["mlp"]["kernel"]  # noqa: E731
        small = compact(fn, tree, x)
        assert small.params["mlp"]["kernel"].left.shape == (16, rank)
        assert_close(small.fn(small.params, x), fn(tree, x), 20 * rounding("float32"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ramda", "prox_adam"])
def test_what_the_nuclear_norm_leaves(recipe):
    """Ranks die in training; the factors give the same numbers with fewer operations."""
    random = np.random.default_rng(0)
    shapes = {"a": (12, 24), "b": (24, 24), "c": (24, 2)}
    params = {n: jnp.asarray(0.3 * random.normal(size=s), "float32") for n, s in shapes.items()}
    x = jnp.asarray(random.normal(size=(64, 12)), "float32")
    y = jnp.stack([jnp.tanh(x[:, 0]), x[:, 1] * x[:, 2]], axis=1)

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    structure = oxs.rules(("c", None), default=oxs.NuclearNorm())
    solver = oxs.ProximalGradient(max_iters=5, rtol=1e-3)
    if recipe == "ramda":
        stages = oxs.Stages.equal(300, number=2)
        optimizer = oxs.ramda(1e-2, structure, 3e-2, momentum=0.8, stages=stages, solver=solver)
    else:
        optimizer = oxs.prox_adam(1e-2, structure, 3e-2, solver=solver)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(lambda p: ((fn(p, x) - y) ** 2).mean())(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]

    trained = train(params)
    small = compact(fn, trained, x)
    ranks = {layer.path: layer.rank for layer in small.report.layers}
    assert 0 < ranks["b"] <= 4
    assert small.report.flops[1] < small.report.flops[0] / 1.5
    assert_close(small.fn(small.params, x), fn(trained, x), 50 * rounding("float32"))
