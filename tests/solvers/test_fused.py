"""The kernel in Pallas' interpreter against the solve that XLA compiles, and when it is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from solvers.snapshots import solve
from tolerances import assert_close, reordered

import optax_structured as oxs
from optax_structured.proximal import fused

ROWS, COLUMNS = oxs.GroupLasso(group_axis=-2), oxs.GroupLasso(group_axis=-1)


def problem(shape, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    v, c = rng.standard_normal((2, *shape))
    metric = np.exp(spread * rng.standard_normal(shape))
    return [jnp.asarray(x, jnp.float32) for x in (v, metric, c)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 2**11)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lasso, shape",
    [
        (ROWS, (16, 136)),
        (ROWS, (37, 136)),  # the last block is not full
        (ROWS, (3, 130)),
        (COLUMNS, (24, 300)),
        (COLUMNS, (3, 3, 4, 256)),
        (oxs.GroupLasso(group_axis=-2, batch_axis=0), (3, 16, 64)),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_the_kernel_is_the_exact_solve(lasso, shape, spread, small_blocks):
    v, metric, c = problem(shape, spread)
    norms = np.sort(np.asarray(lasso.norms(metric * c - v)), axis=None)
    between = norms[norms.size // 2 - 1 : norms.size // 2 + 1]  # half of the groups die
    strength = float(np.mean(between)) / lasso.group_weight(shape)
    expected = solve(oxs.Exact(), lasso, v, metric, c, strength, c)
    inside = lasso.coupled_axes(len(shape))
    threshold = jnp.float32(strength * lasso.group_weight(shape))
    got = fused.solve_blocks(v, metric, c, threshold, inside=inside, interpret=True)
    alive = np.asarray(lasso.support(expected))
    assert 0 < alive.sum() < alive.size
    assert_close(got, expected, reordered(jnp.float32))


def lowered(lasso, shape, platform="tpu"):
    optimizer = oxs.ramda(0.1, lasso, 0.1, solver=oxs.proximal.FusedExact())
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    traced = jax.jit(step).trace(params, state, params)
    return traced.lower(lowering_platforms=(platform,)).as_text()


CALL = "tpu_custom_call"


@pytest.mark.parametrize("lasso, shape", [(ROWS, (512, 1376)), (COLUMNS, (512, 1376))])
def test_it_is_taken_on_tpus_alone(lasso, shape):
    assert lowered(lasso, shape).count(CALL) == 1
    for platform in ("cpu", "cuda"):
        assert CALL not in lowered(lasso, shape, platform)


@pytest.mark.parametrize(
    "lasso, shape",
    [
        (oxs.GroupLasso(group_axis=1), (16, 8, 32)),  # the axes inside are apart
        (ROWS, (4, 40_000)),  # groups too long for fast memory
        (oxs.GroupMCP(group_axis=-2, gamma=1e3), (16, 128)),
        (oxs.L1(), (16, 128)),
    ],
)
def test_where_it_does_not_fit_it_is_exact(lasso, shape):
    assert CALL not in lowered(lasso, shape)


def test_leaves_that_are_alike_share_a_kernel(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    optimizer = oxs.ramda(0.1, ROWS, 0.1, solver=oxs.proximal.FusedExact())
    params = {i: jax.ShapeDtypeStruct((64, 128), jnp.float32) for i in range(5)}
    traced = jax.jit(optimizer.update).trace(params, jax.eval_shape(optimizer.init, params), params)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count(CALL) == 1


def test_each_device_solves_its_shard_inside_shard_map():
    optimizer = oxs.ramda(0.1, ROWS, 0.1, solver=oxs.proximal.FusedExact())
    params = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    specs = jax.tree.map(lambda x: P("data") if x.ndim else P(), (params, state, params))
    mesh = Mesh(np.asarray(jax.devices("cpu")[:4]), ("data",))
    step = jax.shard_map(
        lambda *xs: optimizer.update(*xs)[0], mesh=mesh, in_specs=specs, out_specs=P("data")
    )
    text = jax.jit(step).trace(params, state, params).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count(CALL) == 1


def test_other_precisions_are_solved_as_ever():
    with jax.enable_x64(True):
        v, metric, c = (x.astype(jnp.float64) for x in problem((4, 6)))
        got = solve(oxs.proximal.FusedExact(), ROWS, v, metric, c, 0.1, c)
        assert got.dtype == jnp.float64
        np.testing.assert_array_equal(got, solve(oxs.Exact(), ROWS, v, metric, c, 0.1, c))
