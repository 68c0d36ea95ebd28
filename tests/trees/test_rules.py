"""The table: first match wins, total, and nothing is silently ignored."""

import copy
import dataclasses
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optax_structured as oxs
from optax_structured.trees import Rules, as_rules, named_leaves, resolve, rules


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A spec that only takes leaves of two or more dimensions."""

    rank: int = 1

    def check(self, shape):
        if len(shape) < 2:
            raise ValueError(f"a leaf of {len(shape)} dimensions is no matrix")


def params():
    return {
        "attention": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
        "embed": {"table": jnp.zeros((5, 2))},
        "layers": [{"kernel": jnp.zeros((3, 3))}, {"kernel": jnp.zeros((3, 3))}],
    }


PATHS = ["attention/bias", "attention/kernel", "embed/table", "layers/0/kernel", "layers/1/kernel"]


def values(table, tree):
    return [item.value for item in table.assign(tree)]


# ---- matching ----


def test_first_match_wins_and_order_is_that_of_leaves():
    table = rules(("bias", 1), ("attention", 2), (r"layers/\d+/kernel$", 3), default=4)
    assert [item.path for item in table.assign(params())] == PATHS
    assert values(table, params()) == [1, 2, 4, 3, 3]
    assert [item.rule for item in table.assign(params())][:3] == ["bias", "attention", None]
    leaves = [item.leaf for item in table.assign(params())]
    assert [x.shape for x in leaves] == [x.shape for x in jax.tree.leaves(params())]


def test_patterns_are_searched_not_matched_at_the_start():
    assert values(rules(("kernel", 1), default=0), params()) == [0, 1, 0, 1, 1]
    assert values(rules(("^layers/0", 1), default=0), params()) == [0, 0, 0, 1, 0]


def test_no_default_needed_when_every_leaf_matches():
    assert values(rules(("kernel|table", 1), ("", 0)), params()) == [0, 1, 1, 1, 1]


def test_an_unmatched_leaf_without_default_raises():
    with pytest.raises(ValueError, match=r"no pattern matches 'embed/table' and there is no def"):
        rules(("kernel|bias", 1)).assign(params())


def test_a_dead_pattern_names_the_three_nearest_paths():
    with pytest.raises(ValueError) as error:
        rules(("atention/kernel", 1), default=0).assign(params())
    assert str(error.value) == (
        "rules: pattern 'atention/kernel' matches no parameter path; the nearest paths are "
        "'attention/kernel', 'layers/0/kernel', 'layers/1/kernel'; correct the pattern or remove it"
    )


@pytest.mark.parametrize(
    "pattern, nearest",
    [("embd", "embed/table"), (r"^head|tabel$", "embed/table"), (r"layers/\d/kernl", "layers/0/")],
)
def test_nearest_paths_see_through_components_and_regex_syntax(pattern, nearest):
    with pytest.raises(ValueError, match=f"nearest paths are '{nearest}"):
        rules((pattern, 1), default=0).labels(params())


def test_every_method_refuses_a_dead_pattern():
    table = rules(("nowhere", None), default=None)
    for method in (table.assign, table.tree, table.labels, table.table):
        with pytest.raises(ValueError, match="matches no parameter path"):
            method(params())
    with pytest.raises(ValueError, match="matches no parameter path"):
        resolve(table, params())


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()])
def test_masked_and_none_positions_keep_a_pattern_alive(hole):
    tree = {"bias": hole, "kernel": jnp.zeros((2, 2))}
    table = rules(("bias", 1), default=2)
    assert values(table, tree) == [2]
    assert table.tree(tree) == {"bias": hole, "kernel": 2}


@pytest.mark.parametrize("empty", [{}, None, {"a": None}, {"a": optax.MaskedNode()}])
def test_a_tree_without_leaves_is_never_an_error(empty):
    table = rules(("bias", Matrix()))
    assert table.assign(empty) == resolve(table, empty) == []
    assert table.tree(empty) == table.labels(empty) == empty
    assert table.table(empty) == "path  shape  dtype  rule  value"


# ---- construction ----


@pytest.mark.parametrize(
    "pairs", [("bias", None), ([("a", 1), ("b", 2)],), ({"a": 1},), ((1, 2),), (("a", 1, 2),)]
)
def test_what_is_no_pair_is_refused(pairs):
    with pytest.raises(TypeError, match=r"takes \(pattern, value\) pairs as separate arguments"):
        rules(*pairs)


def test_a_bad_regex_is_refused():
    with pytest.raises(ValueError, match=r"'\*bias' is not a regular expression \(nothing to rep"):
        rules(("*bias", None))


def test_callables_and_classes_are_refused():
    with pytest.raises(TypeError, match="pattern 'a' is the function .* give a spec, None or a"):
        rules(("a", lambda step: 0.1))
    with pytest.raises(TypeError, match=r"value of default is the class Matrix; .* Matrix\(...\)"):
        rules(default=Matrix)
    with pytest.raises(TypeError, match="the class Matrix"):
        as_rules(Matrix)


def test_frozen_hashable_not_callable_and_no_pytree():
    table = rules(("bias", None), default=Matrix(2))
    assert table == rules(("bias", None), default=Matrix(2)) != rules(("bias", None))
    assert len({table, rules(("bias", None), default=Matrix(2))}) == 1
    assert not callable(table)
    assert jax.tree.leaves(table) == [table]
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.default = None
    with pytest.raises(TypeError):
        hash(rules(default=[1]))


def test_a_table_without_default_survives_copying():
    table = rules(("bias", None))
    assert repr(table) == "Rules(pairs=(('bias', None),), default=<no default>)"
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other == table and hash(other) == hash(table)
        with pytest.raises(ValueError, match="no default"):
            other.assign({"bias": 1.0, "kernel": 1.0})


def test_as_rules():
    table = rules(("bias", None), default=1)
    assert as_rules(table) is table
    assert as_rules(Matrix()) == rules(default=Matrix())
    assert as_rules(None) == rules(default=None)
    assert isinstance(as_rules("sparse"), Rules)


def test_passes_through_inject_hyperparams():
    def recipe(learning_rate, structure):
        def init(p):
            assert resolve(structure, p) == [None, 1]
            return optax.EmptyState()

        def update(g, state, p=None):
            specs = resolve(structure, g)
            return jax.tree.map(lambda x: -learning_rate * x * len(specs), g), state

        return optax.GradientTransformation(init, update)

    table = rules(("bias", None), default=1)
    tx = optax.inject_hyperparams(recipe)(optax.linear_schedule(1.0, 0.0, 4), table)
    p = {"bias": jnp.ones(2), "kernel": jnp.ones(2)}
    updates, state = jax.jit(tx.update)(p, tx.init(p), p)
    np.testing.assert_array_equal(updates["bias"], -2.0)
    assert list(state.hyperparams) == ["learning_rate"]


# ---- tree ----


def test_tree_with_none_values_maps_with_and_without_is_leaf():
    table = rules(("bias|embed", None), default="sparse")
    p = params()
    out = table.tree(p)
    for is_leaf in (None, lambda x: x is None):
        mapped = jax.tree.map(lambda x, value: (x.ndim, value), p, out, is_leaf=is_leaf)
        assert mapped["attention"] == {"kernel": (2, "sparse"), "bias": (1, None)}
    assert jax.tree.leaves(out, is_leaf=lambda x: x is None) == values(table, p)


# ---- labels ----


def test_string_values_are_the_labels():
    table = rules(("bias", "plain"), ("embed", "plain"), default="sparse")
    assert jax.tree.leaves(table.labels(params())) == ["plain", "sparse", "plain"] + ["sparse"] * 2


def test_other_values_are_labelled_by_pattern_or_default_and_equal_values_share():
    table = rules(("bias", None), ("embed", Matrix(2)), ("layers/0", None), default=Matrix(2))
    labels = ["bias", "embed", "embed", "bias", "embed"]
    assert jax.tree.leaves(table.labels(params())) == labels
    assert set(jax.tree.leaves(rules(default=Matrix()).labels(params()))) == {"default"}


def test_a_label_never_names_two_values():
    for table in (
        rules(("bias", "embed"), ("embed", Matrix()), default="embed"),
        rules(("default|bias", "default"), default=None),
        rules(("default", 1), default=2),
    ):
        with pytest.raises(ValueError, match="label '(embed|default)' would name both"):
            table.labels(params())


def test_labels_feed_partition():
    table = rules((r"bias|norm", "plain"), default="sparse")
    tx = optax.partition({"plain": optax.sgd(1.0), "sparse": optax.sgd(2.0)}, table.labels)
    p = jax.tree.map(jnp.ones_like, params())
    with pytest.raises(ValueError, match="missing"):
        optax.partition({"plain": tx}, rules(("missing", "plain"), default="plain").labels).init(p)
    updates, state = jax.jit(tx.update)(p, tx.init(p), p)
    for name, leaf in named_leaves(updates):
        np.testing.assert_array_equal(leaf, -1.0 if "bias" in name else -2.0)
    # optax calls `init` with a childless placeholder here: no leaf, so no pattern can be dead.
    optax.tree_map_params(tx, lambda x: x, state)


def test_frozen_leaves_are_not_in_the_norm_that_is_clipped():
    table = rules((r"bias", "frozen"), default="train")
    parts = {"train": optax.clip_by_global_norm(1.0), "frozen": optax.set_to_zero()}
    tx = optax.partition(parts, table.labels)
    p = {"kernel": jnp.full((4,), 0.5), "bias": jnp.full((4,), 1e6)}
    updates, _ = tx.update(p, tx.init(p), p)
    np.testing.assert_array_equal(updates["kernel"], p["kernel"])  # its norm is 1
    assert not updates["bias"].any()


def test_rules_inside_partition_and_masked_see_masked_positions():
    seen = []

    def resolving(table):
        def init(p):
            seen.append(resolve(table, p))
            return optax.EmptyState()

        def update(g, state, p=None):
            seen.append(resolve(table, g))
            return g, state

        return optax.GradientTransformation(init, update)

    inner = rules(("bias", None), ("embed", 1), default=2)  # the other part holds "bias"
    outer = rules(("bias", "plain"), default="sparse")
    tx = optax.partition({"plain": optax.sgd(1.0), "sparse": resolving(inner)}, outer.labels)
    p = params()
    tx.update(p, tx.init(p), p)
    assert seen == [[2, 1, 2, 2]] * 2


def test_labels_feed_partition_in_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    table = rules(("bias$", "frozen"), default="trained")
    tx = optax.partition({"frozen": optax.set_to_zero(), "trained": optax.sgd(1.0)}, table.labels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    bias, kernel = model.bias[...], model.kernel[...]
    optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))
    np.testing.assert_array_equal(model.bias[...], bias)
    np.testing.assert_array_equal(model.kernel[...], kernel - 1.0)


# ---- other libraries and abstract trees ----


def test_linen_equinox_nnx_and_abstract_trees_agree():
    table = rules(("bias$", None), ("(kernel|weight)$", "sparse"))
    linen = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    for tree in (linen, eqx.filter(linear, eqx.is_array), state):
        for tree_or_abstract in (tree, jax.eval_shape(lambda tree=tree: tree)):
            got = {item.path.split("/")[-1]: item.value for item in table.assign(tree_or_abstract)}
            assert sorted(map(str, got.values())) == ["None", "sparse"] and got["bias"] is None
            assert jax.tree.structure(table.labels(tree)) == jax.tree.structure(tree)
            mapped = jax.tree.map(lambda x, value: value, tree, table.tree(tree))
            assert jax.tree.leaves(mapped) == ["sparse"]


# ---- resolve ----


def test_resolve_leaves_plain_what_cannot_take_the_default():
    assert resolve(Matrix(), params()) == [None] + [Matrix()] * 4
    assert resolve(None, params()) == [None] * 5
    assert resolve(rules(("embed", None), default=Matrix()), params())[2] is None
    assert resolve(Matrix(), {"scalar": 1.0, "w": np.zeros((2, 2))}) == [None, Matrix()]


def test_resolve_refuses_an_explicit_spec_that_does_not_fit():
    with pytest.raises(ValueError) as error:
        resolve(rules(("attention", Matrix()), default=None), params())
    assert str(error.value) == (
        "rules: pattern 'attention' gives Matrix(rank=1) to 'attention/bias' of shape (3,), which "
        "cannot take it: a leaf of 1 dimensions is no matrix"
    )


def test_resolve_takes_values_without_check_as_they_are():
    assert resolve(rules(("bias", 0.5), default="x"), params()) == [0.5] + ["x"] * 4


def test_resolve_lets_other_errors_through():
    class Broken:
        def check(self, shape):
            raise TypeError("wrong type")

    with pytest.raises(TypeError, match="wrong type"):
        resolve(Broken(), params())


# ---- table ----


def test_table_is_aligned_and_says_what_is_left_plain():
    tree = {
        "dense": {"bias": jnp.zeros(3, jnp.bfloat16), "kernel": jnp.zeros((128, 64))},
        "embed": jnp.zeros((5, 2)),
        "scale": 1.0,
    }
    table = rules(("^embed", None), default=Matrix(4))
    expected = """\
path          shape      dtype     rule     value
dense/bias    (3,)       bfloat16  default  None (cannot take the default: NO)
dense/kernel  (128, 64)  float32   default  Matrix(rank=4)
embed         (5, 2)     float32   ^embed   None
scale         ()         float     default  None (cannot take the default: NONE)
4 leaves of 8,206 entries; 3 of 14 entries stay plain"""
    expected = expected.replace("NONE", "a leaf of 0 dimensions is no matrix")
    expected = expected.replace("NO", "a leaf of 1 dimensions is no matrix")
    assert table.table(tree) == expected


def test_leaves_that_differ_in_numbers_only_are_one_row():
    layers = [{"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)} for _ in range(12)]
    tree = {"Dense_0": jnp.zeros((8, 4)), "Dense_1": jnp.zeros((4, 2)), "layers": layers}
    table = rules((r"layers/(3|5)/kernel", 1), ("bias", None), default=2)
    for params in (tree, jax.eval_shape(lambda: tree)):
        _, *rows, summary = table.table(params).splitlines()
        assert [row[: row.index("  ")] for row in rows] == [
            "Dense_0",
            "Dense_1",
            "layers/{0..11}/bias (12 leaves)",
            "layers/*/kernel (10 leaves)",
            "layers/{3,5}/kernel (2 leaves)",
        ]
        assert summary == "26 leaves of 280 entries; 12 of 48 entries stay plain"


# ---- rules that do nothing ----


def test_a_rule_that_earlier_ones_shadow_is_an_error():
    table = rules(("kernel", 1), ("attention/kernel", 2), default=0)
    for method in (table.assign, table.tree, table.labels, table.table):
        with pytest.raises(ValueError) as error:
            method(params())
        assert str(error.value) == (
            "rules: pattern 'attention/kernel' gets no leaf, because earlier patterns match "
            "everything that it matches: 'kernel' takes 'attention/kernel'; put 'attention/kernel' "
            "before it, or remove it"
        )
    assert values(rules(*table.pairs[::-1], default=0), params()) == [0, 2, 0, 1, 1]


def test_a_shadowed_rule_that_changes_nothing_is_allowed_and_shown():
    same = rules((r"embed|bias", None), ("attention/bias", None), default=1)
    everything = rules(("kernel", 1), ("bias|embed", 2), (".*", 3))
    for table, idle in ((same, "attention/bias"), (everything, ".*")):
        table.labels(params())
        assert table.table(params()).splitlines()[-1] == (
            f"no leaf goes by the pattern {idle!r}: earlier ones match first, or it is masked"
        )


def test_below_a_masked_subtree_every_pattern_may_be_alive():
    """`optax.masked` with a mask that is a prefix leaves one node in the place of a subtree."""
    tree = {"enc": {"kernel": jnp.zeros((4, 3))}, "head": optax.MaskedNode()}
    table = rules(("head/kernel", 1), ("kernel", 2), ("head", 3), default=4)
    assert values(table, tree) == [2]
    assert "no leaf goes by the pattern 'head/kernel'" in table.table(tree)


@pytest.mark.slow
def test_a_mask_of_subtrees_around_a_recipe():
    tree = {"enc": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((5, 2))}}
    spec, kernels = oxs.LowRank(2), {"enc": True, "head": False}
    lasso = oxs.GroupLasso(-2)
    for alone, recipe in (
        (spec, lambda s: oxs.galore(0.1, oxs.rules(("head/kernel", None), default=s))),
        (lasso, lambda s: oxs.ramda(0.1, oxs.rules(("head/kernel", None), default=s), 0.1)),
        (spec, lambda s: oxs.trion(0.1, oxs.rules(("head/kernel", None), default=s))),
    ):
        tx, plain = optax.masked(recipe(alone), kernels), recipe(alone)
        got, _ = tx.update(tree, tx.init(tree), tree)
        expected, _ = plain.update(tree, plain.init(tree), tree)
        np.testing.assert_array_equal(got["enc"]["kernel"], expected["enc"]["kernel"])
        np.testing.assert_array_equal(got["head"]["kernel"], tree["head"]["kernel"])
