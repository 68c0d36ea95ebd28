"""A state of other settings, or of another tree, is told in one sentence while tracing."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from recipes_table import every_low_rank_case, gradients, params

import optax_structured as oxs

RECIPES = (
    *("galore", "fira", "apollo", "apollo_mini", "dct_adamw", "trion", "q_galore", "ldadam"),
    *("grad_norm_lorp", "lookahead"),
)


def build(recipe, *args, **parts):
    low_rank = oxs.LowRank(*args, **parts)
    if recipe == "lookahead":
        return oxs.grad_norm_lorp(0.1, low_rank, mode="lookahead")
    return getattr(oxs, recipe)(0.1, low_rank)


def resume(before, after, start=None, grads=None):
    start = params() if start is None else start
    grads = start if grads is None else grads
    state = jax.eval_shape(before.init, start)
    jax.eval_shape(after.update, grads, state, grads)


@pytest.mark.parametrize("ranks", [(2, 3), (3, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_another_rank(recipe, ranks):
    old, new = ranks
    message = (
        rf"the state of 'dense/kernel' was made for rank {old}\b.* the optimizer has rank {new}\b"
        r".* go on with rank .*oxs\.reinit\(optimizer, state, params, '\^dense/kernel\$'\)"
    )
    with pytest.raises(ValueError, match=message):
        resume(build(recipe, old), build(recipe, new))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_settings_pass(recipe):
    resume(build(recipe, 2), build(recipe, 2))


SETTINGS = {
    "projector": (
        ("galore", {}),
        ("galore", {"projector": oxs.DCT()}),
        r"bases of shape \(2, 4\), and the optimizer has bases of shape \(2,\)",
    ),
    "tucker-rank": (
        ("galore", {"rank": (1, 2), "projector": oxs.projectors.Tucker()}),
        ("galore", {"rank": (2, 2), "projector": oxs.projectors.Tucker()}),
        r"bases\.0 of shape \(6, 1\), and the optimizer has bases\.0 of shape \(6, 2\)",
    ),
    "side": (
        ("galore", {}),
        ("galore", {"axes": oxs.Axes(side="large")}),
        r"bases of shape \(2, 4\), and the optimizer has bases of shape \(2, 6\)",
    ),
    "refresh": (
        ("galore", {}),
        ("galore", {"refresh": oxs.Lazy()}),
        r"no refresh, and the optimizer has refresh\.rule\.direction of shape \(4,\)",
    ),
    "residual": (
        ("galore", {}),
        ("fira", {}),
        r"no residual, and the optimizer has residual of shape \(\)",
    ),
    "codec": (
        ("galore", {}),
        ("q_galore", {}),
        r"bases of shape \(2, 4\), and the optimizer has rank 2, bases of 4 bits in groups of 8",
    ),
    "bits": (
        ("q_galore", {"codec": oxs.Affine(bits=4)}),
        ("q_galore", {"codec": oxs.Affine(bits=8)}),
        "bases of 4 bits in groups of 8, and the optimizer has bases of 8 bits in groups of 8",
    ),
    "group": (
        ("q_galore", {"codec": oxs.Affine(group=2)}),
        ("q_galore", {"codec": oxs.Affine(group=4)}),
        "bases of 8 bits in groups of 2, and the optimizer has bases of 8 bits in groups of 4",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), SETTINGS.values(), ids=SETTINGS)
def test_other_settings(old, new, message):
    old, new = (build(recipe, **{"rank": 2, **parts}) for recipe, parts in (old, new))
    with pytest.raises(ValueError, match=rf"'dense/kernel' was made for {message}.*oxs\.reinit"):
        resume(old, new)


def test_a_leaf_that_was_plain():
    plain, projected = (
        oxs.galore(0.1, oxs.rules(("kernel", spec), default=oxs.LowRank(2)))
        for spec in (None, oxs.LowRank(2))
    )
    start = {**params(), "other": jnp.ones((5, 4))}
    with pytest.raises(ValueError, match="'dense/kernel' was made for no bases, and the optimizer"):
        resume(plain, projected, start)
    with pytest.raises(ValueError, match="made for bases of shape .* the optimizer has no bases"):
        resume(projected, plain, start)


def test_an_error_feedback_that_was_not_kept():
    kept, dropped = (oxs.ldadam(0.1, oxs.LowRank(2), error_feedback=x) for x in (True, False))
    with pytest.raises(ValueError, match="made for no error, and the optimizer has error of shape"):
        resume(dropped, kept)


def test_another_inner_transformation():
    adam, lion = (
        oxs.low_rank_projection(inner, oxs.LowRank(2))
        for inner in (optax.scale_by_adam(), optax.scale_by_lion())
    )
    with pytest.raises(ValueError, match=r"made for inner\.nu of shape .*, and .* no inner"):
        resume(adam, lion)


def other_trees():
    start = params()
    less = {"dense": {"kernel": start["dense"]["kernel"]}, "gain": start["gain"]}
    return {
        "a plain leaf less": (less, "'dense/bias' is missing"),
        "a matrix less": (
            {"dense": {"bias": start["dense"]["bias"]}, "gain": start["gain"], "new": jnp.eye(3)},
            "'new'|'dense/kernel'",
        ),
        "a plain leaf more": ({**start, "new": jnp.ones(3)}, "'new' is new"),
        "a matrix more": ({**start, "new": jnp.eye(3)}, "'new' is new"),
    }


@pytest.mark.parametrize("tree", other_trees())
@pytest.mark.parametrize("recipe", RECIPES)
def test_another_tree(recipe, tree):
    grads, message = other_trees()[tree]
    if recipe == "trion":  # optax.partition compares its state first
        message += "|belongs to another transformation or to other parameters"
    tx = build(recipe, 2)
    with pytest.raises(ValueError, match=message):
        resume(tx, tx, params(), grads)


def test_no_gradient_at_all():
    tx = build("galore", 2)
    with pytest.raises(ValueError, match="'dense/kernel' is missing"):
        resume(tx, tx, params(), {})


@every_low_rank_case
def test_a_state_that_is_only_numpy_passes(case):
    """What a checkpoint gives back is compared by shape alone."""
    if case.encoded:
        pytest.skip("the state belongs to quantized, which has checks of its own")
    tx = case.build()
    leaves, structure = jax.tree.flatten(tx.init(params()))
    state = structure.unflatten(map(jax.device_get, leaves))
    jax.eval_shape(tx.update, gradients(0), state, params())


def test_the_pattern_of_the_sentence_names_that_leaf_only():
    start = {"w.a": jnp.ones((6, 4)), "w-a": jnp.ones((6, 4))}
    before, after = build("galore", 2), build("galore", 3)
    with pytest.raises(ValueError) as error:
        resume(before, after, start)
    pattern = re.search(r"params, '(.*)'\)", str(error.value))[1].replace("\\\\", "\\")
    assert [name for name in start if re.search(pattern, name)] == ["w-a"]
