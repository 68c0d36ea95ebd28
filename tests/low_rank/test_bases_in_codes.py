"""Bases in 8 or 4 bits: what is stored, what a step reads, and who keeps what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recipes_table import assert_equal, normal
from tolerances import CAPTURED, rounding

import optax_structured as oxs
from optax_structured import SVD, Affine, Axes, LowRank, RandomizedRange, SubspaceIteration

SHAPE = (12, 7)  # no group of 16 ends with a row, or with a matrix
INT4 = Affine(bits=4, group=16)
either_side = pytest.mark.parametrize("side", ["rows", "cols"])
every_codec = pytest.mark.parametrize("codec", [INT4, Affine(8, 16), Affine()], ids=repr)
every_projector = pytest.mark.parametrize(
    "projector", [SVD(), SubspaceIteration(), RandomizedRange()], ids=repr
)


def projection(codec=INT4, inner=None, period=2, side="cols", projector=SVD(), **parts):  # noqa: B008
    spec = LowRank(3, period, Axes(side=side), projector=projector, codec=codec, **parts)
    return oxs.low_rank_projection(inner or optax.identity(), spec)


def beside(basis, side):
    """The basis of a state as it lies beside the matrix."""
    return basis.T if side == "rows" else basis


def steps(tx, grads):
    """Update and state after each step."""
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state)
        yield updates, state


@pytest.mark.slow
@either_side
@every_codec
def test_codes_are_those_of_the_fitted_basis(side, codec):
    g = normal("g", SHAPE)
    (_, plain), *_ = steps(projection(None, side=side), [g])
    basis = beside(plain.bases[""], side)
    (_, state), *_ = steps(projection(codec, side=side), [g])
    np.testing.assert_allclose(state.bases[""].scale, codec.encode(basis).scale, rtol=1e-5)
    off = jnp.abs(codec.decode(state.bases[""], basis.shape) - basis)
    assert jnp.max(off) <= 0.501 * jnp.max(state.bases[""].scale)


@pytest.mark.slow
@every_projector
def test_refits_go_on_from_the_decoded_basis(projector):
    """A warm start is as good as any: the rounding is the only loss."""
    g = normal("g", SHAPE)
    _, state = list(steps(projection(projector=projector, period=1), [g] * 6))[-1]
    p = INT4.decode(state.bases[""], (3, 7))
    _, _, best = jnp.linalg.svd(g)
    share = jnp.sum((g @ jnp.linalg.qr(p.T)[0]) ** 2) / jnp.sum((g @ best[:3].T) ** 2)
    assert share >= CAPTURED


@pytest.mark.slow
@either_side
@every_codec
def test_a_step_reads_the_decoded_basis(side, codec):
    """Between refits too; it is not made orthonormal again."""
    g = normal("g", SHAPE)
    shape = (12, 3) if side == "rows" else (3, 7)
    for updates, state in steps(projection(codec, side=side), [g, normal("h", SHAPE)]):
        basis = codec.decode(state.bases[""], shape)
        expected = basis @ basis.T @ g if side == "rows" else g @ basis.T @ basis
        np.testing.assert_allclose(updates, expected, atol=20 * rounding("float32"))
        g = normal("h", SHAPE)


@pytest.mark.slow
def test_a_stack_is_matrix_by_matrix():
    """No group holds entries of two matrices."""
    grads = [normal(t, (3, *SHAPE)) for t in range(3)]
    (_, state) = list(steps(projection(), grads))[-1]
    for i in range(3):
        _, alone = list(steps(projection(), [g[i] for g in grads]))[-1]
        got, expected = state.bases[""], alone.bases[""]
        assert_equal(jax.tree.map(lambda x, i=i: x[i], (got.codes, got.zero)), expected[::2])
        np.testing.assert_allclose(got.scale[i], expected.scale, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("transport", [oxs.Keep(), oxs.Align(), oxs.Rotate()], ids=repr)
@pytest.mark.parametrize("codec", [INT4, Affine(8, 16, published=True)], ids=repr)
def test_a_matrix_that_is_not_fitted_keeps_its_codes_bit_for_bit(codec, transport):
    grads = [normal(t, (2, *SHAPE)) for t in range(3)]
    grads[2] = grads[2].at[0].set(0.0)
    tx = projection(codec, optax.scale_by_adam(), transport=transport)
    _, (_, before), (_, after) = steps(tx, grads)
    old, new = (jax.tree.map(lambda x: x[0], s.bases[""]) for s in (before, after))
    assert_equal(new, old)
    assert not jnp.array_equal(before.bases[""].codes[1], after.bases[""].codes[1])


def test_lazy_judges_the_basis_before_it_is_rounded():
    g = normal("g", SHAPE)
    tx = projection(refresh=oxs.Lazy(memory=1))
    plain = projection(None, refresh=oxs.Lazy(memory=1))
    for (_, got), (_, expected) in zip(steps(tx, [g] * 6), steps(plain, [g] * 6), strict=True):
        assert_equal(got.refresh, expected.refresh)


@pytest.mark.slow
@either_side
@pytest.mark.parametrize("bits, of_an_entry", [(8, 1), (4, 0.5)])
def test_bytes(side, bits, of_an_entry):
    """Codes, and a scale and a zero point of five bytes for each 256 of them."""
    codec = Affine(bits)
    params = {"kernel": jnp.zeros((128, 256))}
    tx = oxs.low_rank_projection(optax.identity(), LowRank(32, axes=Axes(side=side), codec=codec))
    basis, size = tx.init(params).bases["kernel"], 32 * (128 if side == "rows" else 256)
    assert basis.codes.nbytes == size * of_an_entry
    assert basis.scale.nbytes + basis.zero.nbytes == 5 * size // 256
    total = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert oxs.state_bytes(tx, params) == total
    leaf = oxs.memory_report(tx, params).leaves[0]
    # And when it was fitted, a bool.
    assert leaf.state_bytes == size * of_an_entry + 5 * size // 256 + 1


def test_diagnostics_decode_the_basis():
    g = {"w": normal("g", SHAPE)}
    spec = LowRank(3, projector=SVD(), codec=INT4)
    tx = oxs.low_rank_projection(optax.identity(), spec)
    _, state = tx.update(g, tx.init(g))
    basis = INT4.decode(state.bases["w"], (3, 7))
    expected = jnp.linalg.norm(g["w"] @ basis.T) / jnp.linalg.norm(g["w"])
    got = oxs.diagnostics.captured_energy(state, g, spec)["w"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="'w' is in codes: give the LowRank with its codec"):
        oxs.diagnostics.captured_energy(state, g, LowRank(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_codes_are_shared_out_over_the_devices_of_their_leaf(kind):
    """They travel as codes: the numbers are those of one device."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    place = NamedSharding(mesh, P(None, None, "d"))
    spec = LowRank(8, 2, Axes(side="rows"), projector=SVD(), codec=INT4)
    tx = oxs.low_rank_projection(optax.trace(0.9), spec)
    grads = [normal(i, (2, 16, 32)) for i in range(3)]
    *_, (expected, whole) = steps(tx, grads)
    with jax.set_mesh(mesh):
        g = jax.device_put(grads[0], place)
        where = oxs.state_shardings(tx, g)
        state = jax.jit(tx.init, out_shardings=where)(g)
        update = jax.jit(tx.update, out_shardings=(place, where))
        for g in grads:
            got, state = update(jax.device_put(g, place), state)
    codes = state.bases[""].codes
    assert codes.sharding.shard_shape(codes.shape)[1:] != codes.shape[1:]
    np.testing.assert_allclose(got, expected, atol=10 * rounding("float32"))
    np.testing.assert_array_equal(codes, whole.bases[""].codes)
