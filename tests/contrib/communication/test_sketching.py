"""Sketches: the published operators and a federated run; unbiased, adjoint, equal on replicas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from jax.sharding import PartitionSpec
from tolerances import GOLDEN, STANDARD_ERRORS, reordered

from optax_structured.contrib.communication import draw_sketch, sketch_of, sketched_updates

KINDS = ("countsketch", "sparse", "ams", "gaussian", "srht")


def files(key):
    return [name for name in names("sketching-") if any(key in k for k in load(name).arrays)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", files("/table/"))
def test_golden_operators(name):
    golden = load(name)
    d, b = golden.meta["d"], golden.meta["b"]
    x = jnp.asarray(golden.arrays["x"])
    kinds = {key.split("/")[0] for key in golden.arrays if "/" in key}
    assert kinds
    for kind in kinds:
        want = golden.leaves(kind)
        tables = {k.removeprefix("table/"): v for k, v in want.items() if k.startswith("table/")}
        sketch, desketch = sketch_of(kind, tables, d, b)
        np.testing.assert_allclose(sketch(jnp.eye(d)).T, want["R"], atol=GOLDEN, err_msg=kind)
        np.testing.assert_allclose(sketch(x), want["sk"], atol=GOLDEN, err_msg=kind)
        np.testing.assert_allclose(desketch(sketch(x)), want["desk"], atol=GOLDEN, err_msg=kind)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", files("client_sketch"))
def test_golden_federated_run(name):
    """Clients send sketches of where they went; all rebuild the same weights from the answer."""
    golden = load(name)
    meta, arrays = golden.meta, {k: jnp.asarray(v) for k, v in golden.arrays.items()}
    local = optax.sgd(meta["eta_local"])

    def moved(w, a, y):
        def step(carry, _):
            u, state = carry
            gradient = jax.grad(lambda u: 0.5 * jnp.mean((a @ u - y) ** 2))(u)
            updates, state = local.update(gradient, state)
            return (optax.apply_updates(u, updates), state), None

        start = (w, local.init(w))
        return jax.lax.scan(step, start, length=meta["local_steps"])[0][0] - w

    def round_(w, matrix):
        tables = {"bucket": jnp.argmax(jnp.abs(matrix), 0), "sign": matrix.sum(0)}
        sketch, desketch = sketch_of("countsketch", tables, meta["d"], meta["b"])
        sent = sketch(jax.vmap(moved, (None, 0, 0))(w, arrays["A"], arrays["y"]))
        answer = meta["eta_global"] * sent.mean(0)
        w = w + desketch(answer)
        return w, (sent, answer, w)

    run = jax.jit(lambda w: jax.lax.scan(round_, w, arrays["R"])[1])(arrays["w0"])
    for ours, key in zip(run, ("client_sketch", "server", "w"), strict=True):
        np.testing.assert_allclose(ours, arrays[key], atol=GOLDEN, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_linear_adjoint_and_unbiased(kind):
    """The mean over many keys, in standard errors of its own spread, and the second moment."""
    d, b, draws = 12, 8, 4000
    x, y = jax.random.normal(jax.random.key(1), (2, d))
    z = jax.random.normal(jax.random.key(2), (b,))
    sketch, desketch = draw_sketch(jax.random.key(0), d, b, kind)
    np.testing.assert_allclose(sketch(2 * x - y), 2 * sketch(x) - sketch(y), atol=1e-5)
    np.testing.assert_allclose(sketch(x) @ z, x @ desketch(z), atol=1e-5)

    def through(key):
        sketch, desketch = draw_sketch(key, d, b, kind)
        return desketch(sketch(x))

    arrived = jax.jit(jax.vmap(through))(jax.random.split(jax.random.key(3), draws))
    error = arrived.std(0) / draws**0.5
    assert jnp.all(jnp.abs(arrived.mean(0) - x) < STANDARD_ERRORS * error + 1e-6)
    if kind == "countsketch":
        second = jnp.sum(arrived**2, 1) / jnp.sum(x**2)
        error = second.std() / draws**0.5
        assert jnp.abs(second.mean() - (1 + (d - 1) / b)) < STANDARD_ERRORS * error


def test_all_rows_of_a_hadamard_matrix_are_the_identity():
    tables = {"sign": jnp.array([1.0, -1, -1, 1, 1, 1, -1, 1]), "rows": jnp.arange(8)}
    sketch, desketch = sketch_of("srht", tables, 7, 8)
    x = jax.random.normal(jax.random.key(0), (3, 7))
    np.testing.assert_allclose(desketch(sketch(x)), x, atol=1e-6)


@pytest.mark.slow
def test_sketches_are_averaged_and_equal_on_all_devices():
    """What arrives under shard_map is the channel of the mean, bit for bit on each replica."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    gradients = {"w": jax.random.normal(jax.random.key(0), (8, 5, 6)), "b": jnp.ones((8, 3))}
    shared = sketched_updates(0.3, axis_name="data")
    alone = sketched_updates(0.3)
    state = shared.init(None)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=(PartitionSpec("data"), PartitionSpec()),
    )
    def step(g, state):
        updates, state = shared.update(jax.tree.map(lambda a: a[0], g), state)
        return jax.tree.map(lambda a: jax.lax.pcast(a, "data", to="varying")[None], updates), state

    arrived, after = step(gradients, state)
    want, _ = alone.update(jax.tree.map(lambda g: g.mean(0), gradients), state)
    for got, expected in zip(jax.tree.leaves(arrived), jax.tree.leaves(want), strict=True):
        for replica in got:
            np.testing.assert_array_equal(replica, got[0])
        np.testing.assert_allclose(got[0], expected, atol=reordered("float32") * 10)
    assert after.clock.count == 1
    text = step.lower(gradients, state).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_each_round_has_another_sketch_and_leaves_keep_their_dtype():
    tx = sketched_updates(0.5)
    g = {"w": jnp.ones((4, 8), jnp.bfloat16), "none": None, "empty": jnp.zeros((0, 3))}
    state = tx.init(g)
    first, state = tx.update(g, state)
    second, _ = tx.update(g, state)
    assert first["w"].dtype == jnp.bfloat16 and first["empty"].shape == (0, 3)
    assert jnp.any(first["w"] != second["w"])


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 2"):
        sketched_updates(2)
    with pytest.raises(ValueError, match="kind must be one of countsketch, sparse"):
        sketched_updates(0.5, "hash")
    with pytest.raises(ValueError, match="4 blocks takes a multiple of that, got 6"):
        draw_sketch(jax.random.key(0), 9, 6, "sparse")
