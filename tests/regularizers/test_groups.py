"""Which entries make a group: axes, weights, presets, stacked layers, and errors that speak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close, rounding

from optax_structured import regularizers as r
from optax_structured.regularizers import layer_axes
from optax_structured.regularizers.base import piece_size

GROUPED = [r.GroupLasso, r.SparseGroupLasso, r.GroupL0, r.GroupMCP]
grouped = pytest.mark.parametrize("kind", GROUPED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_axis", "shape", "groups", "size"),
    [
        (layer_axes.DENSE_INPUTS, (7, 5), (7,), 5),
        (layer_axes.DENSE_OUTPUTS, (7, 5), (5,), 7),
        (layer_axes.CONV_INPUTS, (3, 3, 7, 5), (7,), 45),
        (layer_axes.CONV_INPUTS, (3, 7, 5), (7,), 15),
        (layer_axes.CONV_FILTERS, (3, 3, 7, 5), (5,), 63),
        (layer_axes.DEPTHWISE_FILTERS, (3, 3, 1, 5), (5,), 9),
        (layer_axes.ATTENTION_IN_INPUTS, (7, 4, 5), (7,), 20),
        (layer_axes.ATTENTION_IN_HEADS, (7, 4, 5), (4,), 35),
        (layer_axes.ATTENTION_OUT_INPUTS, (4, 5, 7), (4, 5), 7),
        (layer_axes.ATTENTION_OUT_HEADS, (4, 5, 7), (4,), 35),
        ((), (7, 5), (), 35),
    ],
)
def test_presets(group_axis, shape, groups, size):
    regularizer = r.GroupLasso(group_axis)
    regularizer.check(shape)
    w = jax.random.normal(jax.random.key(0), shape)
    assert regularizer.support(w).shape == groups
    assert piece_size(regularizer, shape) == size
    assert regularizer.group_weight(shape) == pytest.approx(size**0.5)

    # The same groups in every layer of a stack, each layer on its own.
    layers = jnp.stack([w, 0 * w, 2 * w])
    stacked = layer_axes.stacked(regularizer)
    stacked.check(layers.shape)
    assert piece_size(stacked, layers.shape) == size
    assert stacked.support(layers).shape == (3, *groups)


@pytest.mark.slow
@grouped
def test_stacked_layers_are_solved_one_by_one(kind):
    layers = jax.random.normal(jax.random.key(0), (3, 7, 5))
    each = jax.vmap(lambda layer: kind(layer_axes.DENSE_INPUTS).prox(layer, 1.3, 0.1))(layers)
    stacked = layer_axes.stacked(kind(layer_axes.DENSE_INPUTS)).prox(layers, 1.3, 0.1)
    assert_close(stacked, each, rounding(each.dtype))
    # Stacked in the middle: said by hand.
    middle = kind(0, batch_axis=1).prox(jnp.moveaxis(layers, 0, 1), 1.3, 0.1)
    assert_close(jnp.moveaxis(middle, 1, 0), each, rounding(each.dtype))


def test_stacked_wants_axes_from_the_end_and_a_group():
    with pytest.raises(ValueError, match="counts from the end, got 0"):
        layer_axes.stacked(r.GroupLasso(0))
    with pytest.raises(TypeError, match="take stacked leaves unchanged"):
        layer_axes.stacked(r.L1())


@pytest.mark.slow
@grouped
def test_groups_die_as_wholes(kind):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 16)) * jnp.linspace(0, 1, 8)[:, None]
    regularizer = kind(layer_axes.CONV_INPUTS)
    w = regularizer.prox(kernel, jnp.exp(kernel), 0.3)
    alive = np.any(np.asarray(w) != 0, axis=(0, 1, 3))
    np.testing.assert_array_equal(regularizer.support(w), alive)
    assert 0 < alive.sum() < 8


def test_norms_neither_overflow_nor_underflow():
    lasso = r.GroupLasso(0)
    w = jnp.array([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    np.testing.assert_allclose(lasso.norms(w), [5e30, 5e-30, 0], rtol=1e-6)


@grouped
@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"group_axis": 1.5}, TypeError, "group_axis must be an int or a tuple of ints, got 1.5"),
        ({"group_axis": [0]}, TypeError, "group_axis must be an int or a tuple of ints"),
        ({"group_axis": 0, "batch_axis": "0"}, TypeError, "batch_axis must be an int"),
        ({"group_axis": 0, "weight": 0.0}, ValueError, "weight must be a finite number above 0"),
        ({"group_axis": 0, "weight": float("nan")}, ValueError, "weight must be"),
    ],
)
def test_construction_errors(kind, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        kind(**arguments)


@grouped
@pytest.mark.parametrize(
    ("arguments", "shape", "sentence"),
    [
        ({"group_axis": 2}, (3, 4), "axis 2 is out of range for a leaf of ndim 2"),
        ({"group_axis": 0}, (3,), "use L1"),
        ({"group_axis": (0, 1)}, (3, 4), "no axis inside the groups of a leaf of shape"),
        ({"group_axis": (0, -2)}, (3, 4), "twice"),
        ({"group_axis": 1, "batch_axis": -1}, (3, 4), "both name axis 1"),
        ({"group_axis": ()}, (), "use L1"),
    ],
)
def test_check_says_what_to_do(kind, arguments, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**arguments).check(shape)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: r.ElasticNet(l2=-1.0), "l2 must be a finite number of at least 0"),
        (lambda: r.MCP(threshold=0.0), "threshold must be a finite number above 0"),
        (lambda: r.MCP(gamma=-1.0), "gamma must be a finite number above 0"),
        (lambda: r.SCAD(a=2.0), "a must be above 2, got 2.0"),
        (lambda: r.SCAD(threshold=float("nan")), "threshold must be"),
        (lambda: r.Box(1.0, 1.0), "Box needs low < high, got low=1.0 and high=1.0"),
        (lambda: r.Box(float("nan"), 1.0), "low < high"),
        (lambda: r.SparseGroupLasso(0, l1_ratio=1.0), "l1_ratio must be in"),
        (lambda: r.GroupMCP(0, gamma=0.0), "gamma must be a finite number above 0"),
        (lambda: r.GroupMCP(0, threshold=-1.0), "threshold must be a finite number above 0"),
    ],
)
def test_bad_scalars(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def test_entrywise_regularizers_take_any_leaf():
    for regularizer in (r.L1(), r.L0(), r.LHalf(), r.LTwoThirds(), r.MCP(), r.SCAD(), r.Box()):
        for shape in ((), (3,), (2, 3, 4)):
            regularizer.check(shape)
            w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            out = jax.eval_shape(regularizer.prox, w, w, 0.1)
            assert (out.shape, out.dtype) == (shape, jnp.float32)
