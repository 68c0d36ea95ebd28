"""Matrix and group views: exact inverses, no needless operation, errors that speak."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_structured.trees import Axes, group_view, normalize_axes


def primitives(f, x):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(f)(x).eqns]


@st.composite
def shapes_and_axes(draw):
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=ndim, max_size=ndim)))
    order = draw(st.permutations(range(ndim)))
    r = draw(st.integers(1, ndim - 1))
    c = draw(st.integers(1, ndim - r))
    signed = [axis - ndim if draw(st.booleans()) else axis for axis in order]

    def pick(axes):
        return axes[0] if len(axes) == 1 and draw(st.booleans()) else tuple(axes)

    return shape, Axes(pick(signed[:r]), pick(signed[r : r + c]))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(shapes_and_axes())
def test_from_matrix_inverts_to_matrix(case):
    shape, axes = case
    x = jnp.asarray(np.arange(np.prod(shape)).reshape(shape))
    y = axes.to_matrix(x)
    assert y.shape == axes.matrix_shape(shape)
    np.testing.assert_array_equal(axes.from_matrix(y, shape), x)


def test_to_matrix_is_the_view_it_says():
    x = jnp.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    y = Axes(rows=(3, 0), cols=1).to_matrix(x)  # batch axis 2; rows in the order given
    assert y.shape == (5, 14, 3)
    for i, j, k, m in [(0, 0, 0, 0), (1, 2, 4, 6), (1, 0, 3, 2)]:
        assert y[k, m * 2 + i, j] == x[i, j, k, m]


def test_trailing_single_axes_emit_nothing_and_single_axes_emit_no_reshape():
    x = jnp.zeros((4, 2, 3))
    for axes in (Axes(), Axes(1, 2), Axes((-2,), (-1,))):
        assert primitives(axes.to_matrix, x) == []
        assert primitives(lambda y, axes=axes: axes.from_matrix(y, x.shape), x) == []
    axes = Axes(rows=2, cols=0)
    assert primitives(axes.to_matrix, x) == ["transpose"]
    y = axes.to_matrix(x)
    assert primitives(lambda y: axes.from_matrix(y, x.shape), y) == ["transpose"]


def test_jit_and_vmap():
    axes = Axes(rows=(0, 1), cols=2)
    x = jnp.arange(4.0 * 2 * 3 * 5).reshape(4, 2, 3, 5)
    y = jax.jit(jax.vmap(axes.to_matrix))(x)
    assert y.shape == (4, 6, 5)
    back = jax.vmap(lambda m: axes.from_matrix(m, (2, 3, 5)))(y)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    "side, tall, wide, square",
    [
        ("small", "cols", "rows", "cols"),
        ("large", "rows", "cols", "rows"),
        ("rows", "rows", "rows", "rows"),
        ("cols", "cols", "cols", "cols"),
    ],
)
def test_compressed_side(side, tall, wide, square):
    axes = Axes(side=side)
    got = [axes.compressed_side((9, *shape)) for shape in ((5, 2), (2, 5), (3, 3))]
    assert got == [tall, wide, square]


def test_compressed_side_counts_flattened_axes():
    assert Axes((0, 1, 2), 3).compressed_side((3, 3, 16, 32)) == "cols"
    assert Axes((0, 1), 2).compressed_side((1, 1, 16)) == "rows"


def test_frozen_hashable_not_callable():
    assert Axes() == Axes(-2, -1, "small") and hash(Axes()) == hash(Axes(-2, -1))
    assert not callable(Axes())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Axes().rows = 0


def test_muon_dimension_numbers():
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=2)
    assert Axes.from_dimension_numbers(numbers) == Axes((0, 1), 2)
    default = Axes.from_dimension_numbers(optax.contrib.MuonDimensionNumbers(), side="large")
    assert default == Axes(0, 1, "large")
    with pytest.raises(TypeError, match="reduction_axis and output_axis, got 3"):
        Axes.from_dimension_numbers(3)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: Axes(side="left"),
            ValueError,
            "side must be one of small, large, rows, cols, got",
        ),
        (lambda: Axes(rows=()), ValueError, r"rows=\(\) names no axis"),
        (lambda: Axes(cols=[0, 1]), TypeError, r"cols must be an int or a tuple of ints, got \[0"),
        (lambda: Axes(rows=(0, 1.5)), TypeError, "rows must be an int or a tuple of ints"),
    ],
)
def test_construction_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "axes, shape, message",
    [
        (Axes(), (3,), r"rows=-2: axis -2 is out of range for a leaf of ndim 1; valid .* -1 to 0"),
        (Axes(), (), "rows=-2: .* ndim 0; a scalar has no axes"),
        (Axes(0, 2), (3, 4), r"cols=2: axis 2 is out of range .* valid axes are -2 to 1"),
        (Axes(0, -2), (3, 4), "rows=0 and cols=-2 both name axis 0 of a leaf of ndim 2"),
        (Axes((0, 1), (2, -2)), (3, 4, 5), r"rows=\(0, 1\) and cols=\(2, -2\) both name axis 1"),
        (Axes((0, -2), 1), (3, 4), r"rows=\(0, -2\) gives an axis of a leaf of ndim 2 twice"),
    ],
)
def test_check_and_every_method_speak(axes, shape, message):
    x = jnp.zeros(shape)
    for call in (axes.check, axes.matrix_shape, axes.compressed_side):
        with pytest.raises(ValueError, match=message):
            call(shape)
    with pytest.raises(ValueError, match=message):
        axes.to_matrix(x)
    with pytest.raises(ValueError, match=message):
        axes.from_matrix(x, shape)


def test_check_accepts_what_fits():
    assert Axes().check((3, 4)) is None
    assert Axes((0, 1), -1).check((0, 2, 3, 4)) is None


def test_from_matrix_refuses_another_shape():
    with pytest.raises(
        ValueError, match=r"matrix view of shape \(2, 3\) under Axes.* got \(3, 2\)"
    ):
        Axes().from_matrix(jnp.zeros((3, 2)), (2, 3))


def test_normalize_axes():
    assert normalize_axes(-1, 3, "axis") == (2,)
    assert normalize_axes((2, -3), 3, "axis") == (2, 0)
    assert normalize_axes((), 0, "axis") == ()
    assert normalize_axes(np.int64(1), 3, "axis") == (1,)
    for bad in ([0], "0", 1.0, (0, None)):
        with pytest.raises(TypeError, match="group_axis must be an int or a tuple of ints, got"):
            normalize_axes(bad, 3, "group_axis")


def test_group_view():
    assert group_view((3, 3, 16, 32), -1) == (0, 1, 2)
    assert group_view(4, (-2, -1)) == (0, 1)
    assert group_view((8, 16, 32), group_axis=-2, batch_axis=0) == (2,)
    assert group_view((8, 16), (0, 1)) == ()
    assert group_view((8, 16), ()) == (0, 1)
    assert group_view((), ()) == ()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((3, 4), -2, 0), "group_axis=-2 and batch_axis=0 both name axis 0 of a leaf of ndim 2"),
        (((3,), -2), "group_axis=-2: axis -2 is out of range for a leaf of ndim 1; valid .* -1 to"),
        (((3, 4), 0, 5), "batch_axis=5: axis 5 is out of range"),
        (((3, 4), (0, 0)), r"group_axis=\(0, 0\) gives an axis of a leaf of ndim 2 twice"),
        (((), -1), "a scalar has no axes"),
    ],
)
def test_group_view_speaks(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_view(*arguments)


def test_sharded_single_axes_survive_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec(None, "x", None)
    with jax.sharding.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((2, 4, 3)), jax.sharding.NamedSharding(mesh, spec))
        y = jax.jit(Axes(rows=2, cols=1).to_matrix)(x)
        assert jax.typeof(y).sharding.spec == jax.sharding.PartitionSpec(None, None, "x")
