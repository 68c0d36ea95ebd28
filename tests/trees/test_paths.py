"""Names of leaves: the same for every library, and the same in `init` and `update`."""

import collections

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

from optax_structured.trees import (
    map_named,
    name_of_key,
    named_leaves,
    path_name,
    state_keys,
)


def names(tree):
    return [name for name, _ in named_leaves(tree)]


def spy(seen):
    """A transformation that only writes down the names it is shown."""

    def init(params):
        seen["init"] = names(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        seen["updates"], seen["params"] = names(updates), names(params)
        return updates, state

    return optax.GradientTransformation(init, update)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
        self.value = nnx.Param(jnp.ones(2))


BLOCK_NAMES = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "value"]


class Attention(eqx.Module):
    query: jax.Array
    value: jax.Array


class Scale(eqx.Module):
    value: jax.Array


def test_dictionaries_lists_and_named_tuples():
    point = collections.namedtuple("point", "x y")
    tree = {"a": [jnp.zeros(1), (jnp.zeros(2),)], "b": point(1.0, 2.0), "c": {0: 3.0}}
    assert names(tree) == ["a/0", "a/1/0", "b/x", "b/y", "c/0"]


def test_order_is_that_of_jax_leaves():
    tree = {"b": 1.0, "a": [2.0, None, optax.MaskedNode(), 3.0]}
    assert [leaf for _, leaf in named_leaves(tree)] == jax.tree.leaves(tree) == [2.0, 3.0, 1.0]
    assert names(tree) == ["a/0", "a/3", "b"]


def test_root_and_empty_trees():
    assert names(jnp.zeros(3)) == [""]
    for empty in ({}, (), None, [], {"a": None}, optax.MaskedNode()):
        assert named_leaves(empty) == []


def test_nnx_state_and_module_have_the_same_names():
    block = Block(nnx.Rngs(0))
    assert names(nnx.state(block, nnx.Param)) == BLOCK_NAMES
    assert names(nnx.to_pure_dict(nnx.state(block, nnx.Param))) == BLOCK_NAMES
    assert names(block) == BLOCK_NAMES


def test_nnx_optimizer_shows_the_same_names_in_init_and_update():
    block, seen = Block(nnx.Rngs(0)), {}
    optimizer = nnx.Optimizer(block, spy(seen), wrt=nnx.Param)
    gradient = nnx.grad(lambda m: m.layers[0](jnp.ones((1, 2))).sum() + m.value.sum())(block)
    optimizer.update(block, gradient)
    assert seen == {"init": BLOCK_NAMES, "updates": BLOCK_NAMES, "params": BLOCK_NAMES}


def test_linen_with_and_without_partitioning_boxes():
    boxed = nn.with_partitioning(nn.initializers.ones, (None, "x"))
    for kernel_init in (nn.initializers.ones, boxed):
        params = nn.Dense(3, kernel_init=kernel_init).init(jax.random.key(0), jnp.ones((1, 2)))
        assert names(params) == ["params/bias", "params/kernel"]


def test_equinox_attributes():
    mlp = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    assert names(mlp) == [
        "layers/0/weight",
        "layers/0/bias",
        "layers/1/weight",
        "layers/1/bias",
    ]


@pytest.mark.parametrize("query", [jnp.zeros(2), None, optax.MaskedNode()])
def test_a_field_called_value_next_to_others_is_kept(query):
    tree = {"attention": Attention(query, jnp.zeros(2))}
    assert names(tree)[-1] == "attention/value"
    assert names({"value": jnp.zeros(2)}) == ["value"]


def test_a_lone_field_called_value_has_its_owners_name():
    assert names({"a": Scale(jnp.zeros(1)), "b": Scale(jnp.zeros(1))}) == ["a", "b"]
    assert names(Scale(jnp.zeros(1))) == [""]


def test_path_name_strips_one_attribute_only():
    def of(tree):
        return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]

    assert of({"kernel": Scale(jnp.zeros(1)), "value": 1.0}) == ["kernel", "value"]
    assert of(Scale(Scale(jnp.zeros(1)))) == ["value"]
    assert path_name(()) == ""


def test_abstract_trees():
    params = jax.eval_shape(lambda: {"a": {"w": jnp.zeros((2, 3))}})
    assert names(params) == ["a/w"]


def test_map_named_keeps_structure_and_passes_the_rest():
    tree = {"a": [1, None], "b": optax.MaskedNode(), "c": 2}
    rest = {"a": [10, None], "b": optax.MaskedNode(), "c": None}
    out = map_named(lambda name, x, y: (name, x, y), tree, rest)
    assert out == {"a": [("a/0", 1, 10), None], "b": optax.MaskedNode(), "c": ("c", 2, None)}


def test_map_named_refuses_another_structure():
    with pytest.raises(ValueError):
        map_named(lambda name, x, y: x, {"a": 1}, {"b": 1})


def test_map_named_inside_jit_and_nnx():
    state = nnx.state(Block(nnx.Rngs(0)), nnx.Param)
    out = jax.jit(lambda s: map_named(lambda name, x: x * ("bias" in name), s))(state)
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert not out["layers"][0]["kernel"][...].any()


def test_keys_of_a_state_hold_no_slash_and_give_the_names_back():
    tree = {"a": {"b/c": 1.0, "d:e": 2.0}, "f": 3.0}
    keys = state_keys(tree)
    assert keys == ["a:b:c", "a:d:e", "f"]
    assert [name_of_key(key) for key in keys] == names(tree)
    assert names(dict.fromkeys(keys, 0.0)) == names(tree)  # a state by key names the same leaves


@pytest.mark.parametrize("key", ["a/b", "a:b"])
def test_leaves_of_one_name_are_refused(key):
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        state_keys({"a": {"b": 1.0}, key: 2.0})
