"""Presets on whole models of flax, equinox and haiku: stacks, attention, what stays plain."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optax_structured as oxs
from optax_structured import presets

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((1, 5, 64), jnp.float32)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=8)(x)
        return x + nn.Dense(64)(nn.LayerNorm()(x)), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scan(name="blocks")(x, None)
        for _ in range(2):
            x = nn.Dense(64)(x)
        x = x + nn.Embed(10, 64)(jnp.zeros(5, int))
        return nn.Dense(10, name="head")(nn.Conv(64, (3,), feature_group_count=2)(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(8, 64, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.dense = nnx.Linear(64, 64, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock))(rngs)
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.embed = nnx.Embed(10, 64, rngs=rngs)
        self.conv = nnx.Conv(64, 64, (3,), feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)


class EquinoxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    dense: eqx.nn.Linear

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(8, 64, key=key)
        self.norm = eqx.nn.LayerNorm(64)
        self.dense = eqx.nn.Linear(64, 64, key=key)


class EquinoxModel(eqx.Module):
    blocks: EquinoxBlock
    layers: list
    embed: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, 3))
        self.layers = [eqx.nn.Linear(64, 64, key=key) for _ in range(2)]
        self.embed = eqx.nn.Embedding(10, 64, key=key)
        self.conv = eqx.nn.Conv1d(64, 64, 3, groups=2, key=key)
        self.cell = eqx.nn.GRUCell(64, 64, key=key)
        self.head = eqx.nn.Linear(64, 10, key=key)


def haiku_model(x):
    def block(x):
        attend = hk.MultiHeadAttention(8, 8, w_init=hk.initializers.VarianceScaling())
        x = x + attend(x, x, x)
        return x + hk.Linear(64)(hk.LayerNorm(-1, True, True)(x))

    x = hk.experimental.layer_stack(3)(block)(x)
    x = hk.nets.MLP([64, 64])(x)
    x = x + hk.Embed(10, 64)(jnp.zeros(5, int))
    x, _ = hk.dynamic_unroll(hk.GRU(64), x[0], jnp.zeros(64))
    return hk.Linear(10, name="head")(hk.Conv1D(64, 3, feature_group_count=2)(x[None]))


def models():
    """The model, example inputs, abstract parameters."""
    linen, haiku = LinenModel(), hk.transform(haiku_model)
    nnx_model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    equinox = eqx.filter_eval_shape(EquinoxModel, KEY)
    is_weight = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return {
        "linen": (linen, (X,), jax.eval_shape(linen.init, KEY, X)["params"]),
        "nnx": (nnx_model, (), nnx.state(nnx_model, nnx.Param)),
        "equinox": (equinox, (), eqx.filter(equinox, is_weight)),
        "haiku": (haiku, (X,), jax.eval_shape(haiku.init, KEY, X)),
    }


MODELS = models()
# Matrices of outputs by inputs that a table must find, and how many leaves of each.
BLOCKS = {(3, 64, 64): 5}
EXPECTED = {
    "linen": {**BLOCKS, (64, 64): 2, (10, 64): 1},
    "nnx": {**BLOCKS, (64, 64): 2, (10, 64): 1},
    "equinox": {**BLOCKS, (64, 64): 2, (192, 64): 2, (10, 64): 1},
    "haiku": {**BLOCKS, (64, 64): 2, (192, 64): 2, (10, 64): 1},
}
every_model = pytest.mark.parametrize("library", MODELS)


@every_model
def test_every_linear_kernel_is_one_matrix_a_layer(library):
    model, inputs, params = MODELS[library]
    found = {}
    for item in presets.axes(model, *inputs).assign(params):
        if item.value is not None:
            shape = item.value.matrix_shape(item.leaf.shape)
            found[shape] = found.get(shape, 0) + 1
    assert found == EXPECTED[library]


@every_model
def test_low_rank_in_one_word(library):
    model, inputs, params = MODELS[library]
    table = presets.low_rank(model, oxs.LowRank(16), *inputs)
    tx = oxs.galore(1e-2, table)
    state = jax.eval_shape(tx.init, params)
    bases = [basis.shape for basis in jax.tree.leaves(state.inner_state[0].bases)]
    # The head, (64, 10), would take more than plain Adam does: 640 entries are not judged.
    assert bases.count((3, 16, 64)) == 5 and set(bases) == {(3, 16, 64), (16, 64), (10, 10)}
    assert oxs.state_bytes(tx, params) < oxs.state_bytes(optax.adam(1e-2), params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@every_model
def test_kernels_that_are_left_out_by_name(library):
    model, inputs, params = MODELS[library]
    table = presets.low_rank(model, oxs.LowRank(16), *inputs, plain="^head")
    given = {item.path: item.value for item in table.assign(params)}
    plain = {path for path, value in given.items() if value is None}
    all_of_them = presets.low_rank(model, oxs.LowRank(16), *inputs)
    others = {item.path for item in all_of_them.assign(params) if item.value is None}
    (head,) = plain - others
    assert head.startswith("head/")
    with pytest.raises(ValueError, match="haed' matches none of the kernels"):
        presets.low_rank(model, oxs.LowRank(16), *inputs, plain="^haed")


def test_kernels_that_would_not_save_stay_plain():
    """From two thirds of a square matrix on; the other kernel is wide."""
    model = eqx.nn.MLP(64, 256, width_size=64, depth=1, key=KEY)
    table = presets.low_rank(model, oxs.LowRank(44))
    specs = [item.value for item in table.assign(eqx.filter(model, eqx.is_array)) if item.value]
    assert [spec.rank for spec in specs] == [44]


@every_model
def test_groups_go_into_a_recipe(library):
    model, inputs, params = MODELS[library]
    penalty = functools.partial(oxs.GroupMCP, gamma=3.0)
    table = presets.groups(model, penalty, *inputs)
    given = {item.path: (item.value, item.leaf) for item in table.assign(params)}
    for kernel in presets.kernels(model, *inputs):
        regularizer, leaf = given[kernel.path]
        if kernel.groups > 1:  # a convolution in two groups has no axis of inputs
            assert regularizer is None
            continue
        support = jax.eval_shape(regularizer.support, leaf)
        stack = (3,) if leaf.shape[0] == 3 else ()
        read = [leaf.shape[axis] for axis in kernel.inputs]
        assert sorted(support.shape) == sorted((*stack, *read))
    jax.eval_shape(oxs.prox_ssi(1e-2, table, 1e-3).init, params)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_heads_are_an_axis_in_flax(library):
    model, inputs, params = MODELS[library]
    table = presets.groups(model, oxs.GroupLasso, *inputs, by="heads")
    given = [item for item in table.assign(params) if item.value is not None]
    assert len(given) == 4
    for item in given:
        assert item.value.support(jnp.ones(item.leaf.shape)).shape == (3, 8)


@pytest.mark.parametrize("library", ["equinox", "haiku"])
def test_heads_are_no_axis_elsewhere(library):
    model, inputs, _ = MODELS[library]
    with pytest.raises(ValueError, match="has no kernel that could take this"):
        presets.groups(model, oxs.GroupLasso, *inputs, by="heads")


@every_model
def test_a_table_for_one_library_is_refused_by_the_parameters_of_another(library):
    model, inputs, _ = MODELS[library]
    for table in (
        presets.groups(model, oxs.GroupLasso, *inputs),
        presets.low_rank(model, oxs.LowRank(16), *inputs),
    ):
        for other in MODELS.keys() - {library}:
            with pytest.raises(ValueError, match="matches no parameter path"):
                table.assign(MODELS[other][2])


def test_subclasses_are_what_they_subclass():
    class Special(nn.Dense):
        pass

    (kernel,) = presets.kernels(Special(3), jnp.ones((1, 2)))
    assert (kernel.layer, kernel.inputs, kernel.outputs) == ("Special", (0,), (1,))


def test_what_names_no_layers_is_refused():
    params = MODELS["linen"][2]
    with pytest.raises(TypeError, match="alone do not say which axes are inputs"):
        presets.low_rank(params, oxs.LowRank(16))
    with pytest.raises(TypeError, match="give example inputs too"):
        presets.low_rank(LinenModel(), oxs.LowRank(16))
    with pytest.raises(ValueError, match=r"give Axes\(side=...\) only"):
        presets.low_rank(MODELS["nnx"][0], oxs.LowRank(16, axes=oxs.Axes(rows=0, cols=1)))
    with pytest.raises(TypeError, match=r"takes a LowRank, such as LowRank\(rank=128\), got 4"):
        presets.low_rank(MODELS["nnx"][0], 4)
    with pytest.raises(TypeError, match="the class GroupLasso, not GroupLasso"):
        presets.groups(MODELS["nnx"][0], oxs.GroupLasso(group_axis=-2))
    with pytest.raises(ValueError, match="by must be one of inputs, outputs, heads, got 'rows'"):
        presets.groups(MODELS["nnx"][0], oxs.GroupLasso, by="rows")
    with pytest.raises(ValueError, match="its kernels are of no layer that is known"):
        presets.axes(eqx.nn.LayerNorm(4))
