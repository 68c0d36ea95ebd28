"""Ranks from spectra: the published integers, the solver, the factors, the optimizer for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from golden_files import load
from recipes_table import normal
from tolerances import rounding

from optax_structured import presets
from optax_structured.low_rank import LowRank
from optax_structured.trees import Axes, rules
from optax_structured.weights import Factors, factorize, merge, train_factors
from optax_structured.weights.welore import LLAMA_2_THRESHOLDS, singular_values, welore_plan

GOLDEN = load("welore-rank-selection")
WEIGHTS = GOLDEN.leaves("weights")
THRESHOLDS = GOLDEN.hyperparameters["thresholds"]
PUBLISHED = {"min_ratio": GOLDEN.hyperparameters["min_ratio"]}


@pytest.mark.parametrize(
    "threshold, summary", [*zip(THRESHOLDS, GOLDEN.meta["summary"], strict=True)]
)
def test_published_plans(threshold, summary):
    plan = welore_plan(WEIGHTS, threshold=threshold, **PUBLISHED)
    factored = merge(factorize(WEIGHTS, plan))
    for entry in plan.entries:
        key = f"{entry.path}/t{threshold}"
        assert entry.kept == GOLDEN.arrays[f"kept_rank/{key}"]
        assert (entry.rank is not None) == GOLDEN.arrays[f"is_lrc/{key}"]
        if entry.rank is not None:
            compressed = GOLDEN.arrays[f"compressed/{key}"]
            np.testing.assert_allclose(factored[entry.path], compressed, atol=2e-6)
    np.testing.assert_allclose(plan.attempted_reduction, summary["attempted_reduction"])
    np.testing.assert_allclose(plan.effective_reduction, summary["effective_reduction_lrc_only"])


def test_spectra_are_the_published_ones():
    for path, s in singular_values(WEIGHTS).items():
        np.testing.assert_allclose(s, GOLDEN.arrays[f"singular_values/{path}"], atol=1e-5)


@pytest.mark.parametrize("criterion", ["range", "energy", "median"])
def test_reduction_never_falls_as_the_threshold_rises(criterion):
    spectra = singular_values(WEIGHTS)
    for measure in ("attempted_reduction", "effective_reduction"):
        reductions = [
            getattr(
                welore_plan(WEIGHTS, threshold=t, criterion=criterion, spectra=spectra), measure
            )
            for t in np.linspace(0, 3, 31)
        ]
        assert reductions == sorted(reductions)
    assert reductions[0] == 0


@pytest.mark.parametrize("target", [0.1, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("criterion", ["range", "energy", "median"])
def test_target_is_hit_within_one_singular_value(criterion, target):
    plan = welore_plan(WEIGHTS, target=target, criterion=criterion)
    total = sum(min(w.shape) for w in WEIGHTS.values())
    assert abs(plan.attempted_reduction - target) <= 1 / total


def test_effective_target_is_the_nearest_there_is():
    """Whole matrices enter at once, so the reduction jumps."""
    plan = welore_plan(WEIGHTS, target=0.3, effective=True)
    others = [welore_plan(WEIGHTS, threshold=t) for t in np.linspace(0, 1, 201)]
    best = min(abs(other.effective_reduction - 0.3) for other in others)
    assert abs(plan.effective_reduction - 0.3) <= best + 1e-12


def test_limits():
    assert welore_plan(WEIGHTS, threshold=0.0).attempted_reduction == 0
    assert {e.kept for e in welore_plan(WEIGHTS, threshold=1.1).entries} == {1}
    assert LLAMA_2_THRESHOLDS[0.5] == THRESHOLDS[1]


def test_scale_does_not_matter():
    scaled = {path: 1024 * w for path, w in WEIGHTS.items()}
    assert welore_plan(scaled, target=0.4) == welore_plan(WEIGHTS, target=0.4)


def test_a_flat_spectrum_keeps_all_and_a_zero_matrix_nothing():
    for criterion in ("range", "median"):
        params = {"flat": np.eye(4), "zero": np.zeros((4, 4))}
        plan = welore_plan(params, threshold=0.5, criterion=criterion)
        assert dict(plan) == {"flat": None, "zero": 1}


def test_factorised_only_where_it_saves():
    """Half of the singular values are removed: no saving for a matrix that is not square."""
    s = np.array([1.0, 0.9, 0.9, 0.9, 0.01, 0.0, 0.0, 0.0])
    params = {"square": np.diag([1.0, 0.9, 0.9, 0, 0, 0, 0, 0]), "wide": np.zeros((8, 64))}
    params["wide"][:, :8] = np.diag(s)
    assert dict(welore_plan(params, threshold=0.1)) == {"square": 3, "wide": 4}
    tall = {"tall": np.diag(s)[:, :7]}
    assert dict(welore_plan(tall, threshold=0.1)) == {"tall": None}  # 4 * (8 + 7) > 8 * 7
    assert dict(welore_plan(tall, threshold=0.1, min_ratio=0.4)) == {"tall": 4}


def test_energy_is_the_relative_error():
    plan = welore_plan(WEIGHTS, threshold=0.5, criterion="energy", min_ratio=0.0)
    approximated = merge(factorize(WEIGHTS, plan))
    for path, w in WEIGHTS.items():
        s = np.linalg.svd(w, compute_uv=False)
        error = np.linalg.norm(approximated[path] - w)
        np.testing.assert_allclose(error, np.linalg.norm(s[plan[path] :]), rtol=1e-4)
        assert error < 0.5 * np.linalg.norm(w)


def test_stacks_and_axes():
    w = np.asarray(normal("stack", (3, 6, 2, 4)))
    views = rules(("kernel", Axes(rows=1, cols=(2, 3))), default=None)
    params = {"kernel": jnp.asarray(w), "embed": jnp.ones((5, 5))}
    plan = welore_plan(params, views, threshold=0.4, min_ratio=0.0)
    each = [
        welore_plan({"kernel": m.reshape(6, 8)}, threshold=0.4, min_ratio=0.0)["kernel"] for m in w
    ]
    assert dict(plan) == {"kernel": max(each)}
    factored = factorize(params, plan)
    assert factored["kernel"].left.shape == (3, 6, max(each))
    s = np.linalg.svd(w.reshape(3, 6, 8), compute_uv=False)
    error = np.linalg.norm((merge(factored)["kernel"] - w).reshape(3, -1), axis=-1)
    np.testing.assert_allclose(error, np.linalg.norm(s[:, max(each) :], axis=-1), rtol=1e-5)


def test_a_leaf_of_more_axes_has_to_be_explained():
    """Stack, heads or convolution: the shape (64, 4, 16) does not say."""
    params = {"query": normal("q", (64, 4, 16)), "dense": jnp.ones((5, 5))}
    for plan in (singular_values, lambda p: welore_plan(p, threshold=0.1)):
        with pytest.raises(ValueError, match=r"'query' has shape \(64, 4, 16\), which may be a st"):
            plan(params)
    stacks, whole = (
        welore_plan(params, rules(("query", axes), default=None), threshold=0.1).entries[0]
        for axes in (Axes(), Axes(rows=(1, 2), cols=0))
    )
    assert (stacks.matrix_shape, whole.matrix_shape) == ((64, 4, 16), (64, 64))


def test_presets_explain_the_leaves_of_a_model():
    module, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 3, 64))
    params = module.init(jax.random.key(0), x)["params"]
    plan = welore_plan(params, presets.axes(module, x), target=0.3, min_ratio=0.0)
    assert [entry.matrix_shape for entry in plan.entries] == [(64, 64)] * 4
    factored = factorize(params, plan)
    assert factored["query"]["kernel"].left.shape == (64, plan["query/kernel"])


def test_a_plan_prints_as_a_table():
    layers = [{"w": jnp.diag(jnp.array([1.0, 0.9, 0.1, 0.0]))} for _ in range(3)]
    plan = welore_plan({"layers": layers, "eye": jnp.eye(4)}, threshold=0.5, min_ratio=0.4)
    assert str(plan) == plan.table()
    heading, eye, of_layers, summary = str(plan).splitlines()
    assert heading.split() == ["path", "shape", "matrices", "kept", "rank"]
    assert eye.split("  ")[0] == "eye" and eye.endswith("4 of 4  dense")
    assert of_layers.startswith("layers/{0..2}/w (3 leaves)") and of_layers.endswith("2 of 4  2")
    assert summary.startswith("threshold 0.5: 37.5% of all singular values are below, 37.5%")


def test_ranks_of_gradients_that_would_not_save_leave_a_leaf_plain():
    """A rank in proportion to the plan may be the whole of a leaf."""
    flat, steep = np.eye(64), np.diag(np.r_[1.0, np.zeros(63)])
    plan = welore_plan({"flat": flat, "steep": steep}, threshold=0.5)
    table = plan.low_rank(LowRank(32))
    assert {
        x.path: x.value and x.value.rank for x in table.assign({"flat": flat, "steep": steep})
    } == {
        "flat": None,
        "steep": 1,
    }


def test_factors_keep_the_dtype():
    params = {"w": jnp.outer(jnp.arange(6.0), jnp.ones(6)).astype(jnp.bfloat16)}
    factored = factorize(params, {"w": 1})
    assert factored["w"].left.dtype == jnp.bfloat16
    assert merge(factored)["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        merge(factored)["w"].astype(float),
        params["w"].astype(float),
        atol=5 * rounding(jnp.bfloat16),
    )


def test_training_moves_factors_and_norms_and_nothing_else():
    params = {
        "norm": jnp.ones(6),
        "mlp": jnp.outer(normal("u", (6,)), normal("v", (6,))),
        "attention": normal("w", (6, 6)),
    }
    factored = factorize(params, welore_plan(params, threshold=0.2))
    tx = train_factors(optax.adam(0.1))
    state = tx.init(factored)
    trained = 6 + 6 + 6
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * trained + 1

    def loss(factored):
        dense = merge(factored)
        return jnp.sum((dense["mlp"] + dense["attention"]) @ dense["norm"])

    @jax.jit
    def step(factored, state):
        updates, state = tx.update(jax.grad(loss)(factored), state, factored)
        return optax.apply_updates(factored, updates), state

    after, _ = step(factored, state)
    np.testing.assert_array_equal(after["attention"], params["attention"])
    assert isinstance(after["mlp"], Factors)
    for moved in (after["mlp"].left - factored["mlp"].left, after["norm"] - params["norm"]):
        assert jnp.all(moved != 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either target=... or threshold=..., and not both"),
        ({"target": 0.5, "threshold": 0.1}, "and not both"),
        ({"target": 1.5}, r"target is the share of singular values to remove, in \(0, 1\)"),
        ({"target": 0.99}, "no threshold reaches target=0.99: the largest reduction is 0.9"),
        ({"threshold": 0.1, "criterion": "sum"}, "criterion must be one of range, energy, median"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        welore_plan(WEIGHTS, **arguments)


def test_bad_parameters():
    abstract = jax.eval_shape(lambda: {"w": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match="'w' has no values"):
        welore_plan(abstract, threshold=0.1)
    with pytest.raises(ValueError, match="there is no matrix to plan for"):
        welore_plan({"bias": jnp.ones(4)}, threshold=0.1)
    with pytest.raises(ValueError, match="the plan names 'mlp', which is not a path"):
        factorize({"w": jnp.ones((4, 4))}, {"mlp": 1})
    with pytest.raises(ValueError, match="no leaf is factored"):
        train_factors(optax.sgd(0.1)).init({"norm": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match="pattern 'norm' matches no parameter path"):
        train_factors(optax.sgd(0.1)).init(factorize({"w": jnp.ones((4, 4))}, {"w": 1}))
