"""Presets on real layers of flax, equinox and haiku: a group of zeros is an input not read."""

import jax.numpy as jnp
import numpy as np
import pytest
from presets.models import layers

import optax_structured as oxs
from optax_structured import presets
from optax_structured.trees import map_named, named_leaves

LAYERS = {layer.name: layer for layer in layers()}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def groups_of(layer, by):
    """The regularizer that a preset gives to the kernel, and to nothing else."""
    structure = presets.groups(layer.model, oxs.GroupLasso, *layer.inputs, by=by)
    given = {item.path: item.value for item in structure.assign(layer.params)}
    regularizer = given.pop(layer.kernel)
    assert set(given.values()) <= {None}
    return regularizer


def with_one_group_at_zero(layer, regularizer, index):
    """The parameters where group `index` of the kernel is zero, and no other."""

    def zeroed(path, leaf):
        if path != layer.kernel:
            return leaf
        axes = regularizer.group_axis
        at = [slice(None)] * leaf.ndim
        for axis, i in zip(axes if isinstance(axes, tuple) else (axes,), index, strict=True):
            at[axis] = i
        changed = leaf.at[tuple(at)].set(0.0)
        assert jnp.sum(~regularizer.support(changed)) == 1
        return changed

    return map_named(zeroed, layer.params)


def features(layer, x, axes):
    """Indices of the trailing axes of an array."""
    return list(np.ndindex(x.shape[x.ndim - axes :]))


@pytest.mark.slow
@every_layer
def test_a_group_of_inputs_at_zero_is_an_input_that_is_not_read(layer):
    regularizer = groups_of(layer, "inputs")
    indices = features(layer, layer.x, layer.read)
    shape = dict(named_leaves(layer.params))[layer.kernel].shape
    assert regularizer.support(jnp.ones(shape)).size == len(indices)
    for index in (indices[1], indices[-1]):
        params = with_one_group_at_zero(layer, regularizer, index)
        for other in (indices[1], indices[-1]):
            moved = layer.x.at[(..., *other)].add(1.0)
            same = jnp.array_equal(layer.apply(params, moved), layer.apply(params, layer.x))
            assert bool(same) == (other == index)


@pytest.mark.slow
@every_layer
def test_a_group_of_outputs_at_zero_is_an_output_that_is_its_bias(layer):
    regularizer = groups_of(layer, "outputs")
    made = layer.apply(layer.params, layer.x)
    indices = features(layer, made, layer.made)
    for index in (indices[1], indices[-1]):
        params = with_one_group_at_zero(layer, regularizer, index)
        first, second = (layer.apply(params, x) for x in (layer.x, 2 * layer.x + 1))
        for other in (indices[1], indices[-1]):
            same = jnp.array_equal(first[(..., *other)], second[(..., *other)])
            assert bool(same) == (other == index)


LINEAR = {name: x for name, x in LAYERS.items() if "conv" not in name and "depthwise" not in name}
LINEAR = {name: x for name, x in LINEAR.items() if "transposed" not in name}


@pytest.mark.parametrize("layer", LINEAR.values(), ids=LINEAR)
def test_a_linear_kernel_is_one_matrix_of_outputs_by_inputs(layer):
    table = presets.axes(layer.model, *layer.inputs)
    (axes,) = (item.value for item in table.assign(layer.params) if item.value is not None)
    kernel = dict(named_leaves(layer.params))[layer.kernel]
    matrix = axes.to_matrix(kernel)
    made = layer.apply(layer.params, layer.x)
    read = layer.x.reshape(-1, matrix.shape[1])
    bias = layer.apply(layer.params, jnp.zeros_like(layer.x))
    expected = (read @ matrix.T).reshape(made.shape) + bias
    np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - LINEAR.keys()))
def test_convolutions_are_no_linear_kernels(name):
    layer = LAYERS[name]
    with pytest.raises(ValueError, match="has no kernel that could take this; its kernels are"):
        presets.low_rank(layer.model, oxs.LowRank(2), *layer.inputs)
