"""Part of a state starts again, the rest stays bit for bit."""

import jax
import jax.numpy as jnp
import optax
import pytest
from recipes_table import assert_equal, normal_tree, run

import optax_structured as oxs
from optax_structured.states import reinit

SHAPES = {"body": {"kernel": (6, 4), "bias": (4,)}, "head": {"kernel": (4, 6)}}


def transformations():
    labels = jax.tree.map(lambda _: "on", SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return {
        "adamw": optax.adamw(1e-2),
        "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        "partition": optax.partition({"on": optax.adam(1e-2)}, labels),
        "ramda": oxs.ramda(1e-2, oxs.GroupLasso(group_axis=-2), strength=1e-3),
        "galore": oxs.galore(1e-2, oxs.LowRank(2)),
        "fira": oxs.fira(1e-2, oxs.LowRank(2)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", transformations())
def test_only_what_belongs_to_the_chosen_leaves_starts_again(name):
    tx = transformations()[name]
    params, state = run(tx, normal_tree("params", SHAPES), [normal_tree(0, SHAPES)])
    new = jax.jit(lambda state, params: reinit(tx, state, params, "^head"))(state, params)
    fresh = tx.init(params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    flat = zip(*(jax.tree.leaves_with_path(tree) for tree in (new, state, fresh)), strict=True)
    for (path, x), (_, old), (_, start) in flat:
        assert_equal(x, start if "head" in jax.tree_util.keystr(path) else old)


def test_a_pattern_that_matches_nothing_and_another_model_are_explained():
    tx, params = optax.adam(1e-2), normal_tree("params", SHAPES)
    state = tx.init(params)
    with pytest.raises(ValueError, match="matches no parameter path"):
        reinit(tx, state, params, "tail")
    with pytest.raises(ValueError, match="differ in structure"):
        reinit(tx, state, {"head": jnp.ones(3)}, "head")
    with pytest.raises(ValueError, match=r"'head/kernel' has an array of shape \(4, 6\)"):
        reinit(tx, state, {**params, "head": {"kernel": jnp.ones((5, 6))}}, "body")


def test_leaves_that_start_again_may_have_another_shape():
    tx = optax.adam(1e-2)
    params, state = run(tx, normal_tree("params", SHAPES), [normal_tree(0, SHAPES)])
    grown = {**params, "head": {"kernel": jnp.ones((5, 6))}}
    new = reinit(tx, state, grown, "head")
    assert new[0].mu["head"]["kernel"].shape == (5, 6)
    assert_equal(new[0].mu["body"], state[0].mu["body"])
    assert_equal(new[0].count, state[0].count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{"rank": 3}, {"projector": oxs.DCT()}, {"codec": oxs.Affine(bits=4)}],
    ids=["rank", "projector", "codec"],
)
def test_leaves_that_start_again_may_have_other_settings(changed):
    settings = {"rank": 2, "projector": oxs.SVD()}
    tx = oxs.galore(1e-2, oxs.LowRank(**settings))
    other = oxs.LowRank(**{**settings, **changed})
    table = oxs.rules(("head", other), default=oxs.LowRank(**settings))
    params, state = run(tx, normal_tree("params", SHAPES), [normal_tree(0, SHAPES)])
    after = oxs.galore(1e-2, table)
    with pytest.raises(ValueError, match=r"'head/kernel' was made for .* and the optimizer has "):
        after.update(params, state, params)
    new = reinit(after, state, params, "^head/kernel$")
    _, new = after.update(params, new, params)
    assert jax.tree.structure(new) == jax.tree.structure(after.init(params))
    refresh = new.inner_state[0].refresh
    assert int(refresh["body:kernel"].missing) == 0  # an SVD is fitted once: it goes on
    assert int(new.inner_state[0].count) == 2


def test_of_two_leaves_in_a_list_one_starts_again():
    """Their paths are indices, like those of the elements of a chain."""
    tx = optax.adam(1e-2)
    params, state = run(tx, [jnp.ones(2), jnp.ones(2)], [[jnp.ones(2), jnp.ones(2)]])
    new = reinit(tx, state, params, "^0$")
    assert_equal(new[0].mu, [jnp.zeros(2), state[0].mu[1]])
    assert_equal(new[0].count, state[0].count)


def test_a_parameter_named_like_a_hyperparameter_leaves_that_alone():
    tx = optax.inject_hyperparams(oxs.galore)(1e-2, oxs.LowRank(2), scale=0.25)
    params = {name: jnp.ones((4, 3)) for name in ("scale", "b1", "count")}
    params, state = run(tx, params, [params])
    state.hyperparams["scale"] = jnp.asarray(4.0)
    new = reinit(tx, state, params, "scale")
    assert_equal(new.hyperparams, state.hyperparams)
    assert_equal(new.count, state.count)
    moments = [s for s in jax.tree.leaves(new, is_leaf=is_adam) if is_adam(s)]
    assert not jnp.any(moments[0].mu["scale"])
    assert jnp.all(moments[0].mu["b1"] != 0)


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)
