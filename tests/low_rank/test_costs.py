"""A projection that would take more state than plain Adam: an error by name, plain by default."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_structured as oxs

ADAM = optax.scale_by_adam()
# Heads as batch axes: 512 matrices (8, 64), whose rank is at most 8.
QUERY, DENSE = {"query": (512, 8, 64)}, {"dense": (256, 384)}

RECIPES = {
    "galore": oxs.galore,
    "fira": oxs.fira,
    "apollo": oxs.apollo,
    "dct_adamw": oxs.dct_adamw,
    "trion": oxs.trion,
    "ldadam": oxs.ldadam,
    "grad_norm_lorp": oxs.grad_norm_lorp,
    "q_galore": oxs.q_galore,
}


def abstract(shapes):
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_leaf_that_only_met_the_default_stays_plain(recipe):
    params = abstract({**QUERY, **DENSE})
    tx = RECIPES[recipe](1e-3, oxs.LowRank(128))
    alone = RECIPES[recipe](1e-3, oxs.rules(("query", None), default=oxs.LowRank(128)))
    assert jax.tree.leaves(jax.eval_shape(tx.init, params)) == jax.tree.leaves(
        jax.eval_shape(alone.init, params)
    )
    for tree in (tx, alone):
        out, _ = jax.eval_shape(tree.update, params, jax.eval_shape(tree.init, params), params)
        assert out == params


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_leaf_that_a_rule_names_is_an_error(recipe):
    params = abstract({**QUERY, **DENSE})
    tx = RECIPES[recipe](1e-3, oxs.rules(("query", oxs.LowRank(128)), default=None))
    with pytest.raises(ValueError) as error:
        tx.init(params)
    for part in (
        "'query' of shape (512, 8, 64)",
        "rank 8 of 512 matrices (8, 64) takes 557,056 numbers of state, plain Adam 524,288",
        "lower the rank, name the axes",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_rank_above_every_side_is_an_error(recipe):
    with pytest.raises(ValueError, match="no leaf can be projected; 'dense': rank 256 of the matr"):
        RECIPES[recipe](1e-3, oxs.LowRank(5000)).init(abstract(DENSE))


PROJECTORS = {
    "one side": (oxs.SVD(), [*range(1, 260)]),
    "two sides": (oxs.projectors.TwoSided(), [*range(1, 260)]),
    "tucker": (oxs.projectors.Tucker(), [0.1, 0.5, 0.9, 0.999, (64, 64), (256, 384), 100, 300]),
}


@pytest.mark.parametrize("side", ["small", "large"])
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("shape", [(256, 384), (96, 96), (3, 64, 32)], ids=str)
def test_what_is_accepted_takes_at_most_as_much_as_adam(projector, side, shape):
    """Exactly: what is refused would take more."""
    kind, ranks = PROJECTORS[projector]
    adam = sum(x.size for x in jax.eval_shape(ADAM.init, jnp.ones(shape))[1:])
    refused = 0
    for rank in ranks[:: 1 + len(ranks) // 40]:
        if isinstance(rank, tuple) and len(shape) > 2:
            continue
        spec = oxs.LowRank(rank, projector=kind, axes=oxs.Axes(side=side))
        frame = spec.frame(shape)
        basis = jax.eval_shape(lambda s=spec, f=frame: s.projector.init(f, jnp.float32, ""))
        low = jax.ShapeDtypeStruct(frame.low_shape, jnp.float32)
        held = sum(x.size for x in jax.tree.leaves(basis)) + 2 * low.size
        if held <= adam:
            spec.check(shape)
            continue
        refused += 1
        with pytest.raises(ValueError, match=f"takes {held:,} numbers of state, plain Adam"):
            spec.check(shape)
    # Full rank of the larger side of two to one takes just as much.
    assert refused or (side, shape) == ("large", (3, 64, 32))


def test_small_leaves_are_not_judged():
    """Full rank is how an optimizer is compared with another on a small example."""
    params = jnp.ones((31, 33))
    assert oxs.galore(1e-3, oxs.LowRank(99)).init(params).inner_state[0].bases
    with pytest.raises(ValueError, match="takes .* plain Adam 2,048"):
        oxs.galore(1e-3, oxs.LowRank(99)).init(jnp.ones((32, 32)))


def test_tables_print_the_rank_that_is_kept_and_what_is_plain():
    params = abstract({**QUERY, **DENSE, "small": (8, 20)})
    table = oxs.rules(default=oxs.LowRank(100))
    dense, query, small = table.table(params).splitlines()[1:4]
    assert dense.split()[-1] == "LowRank(100)" and small.split()[-1] == "LowRank(8)"
    assert query.endswith(
        "None (cannot take the default: rank 8 of 512 matrices (8, 64) takes 557,056 numbers of "
        "state, plain Adam 524,288)"
    )
    ranks = [x.spec and x.spec.rank for x in memory(table, params)]
    assert ranks == [100, None, 8]
    heads = oxs.rules(default=oxs.LowRank(2))
    assert "LowRank(2) of 512 matrices (8, 64)" in heads.table(params)


def memory(table, params):
    report = oxs.memory_report(oxs.galore(1e-3, table), params, table)
    adam = oxs.memory_report(optax.adam(1e-3), params)
    for leaf, plain in zip(report.leaves, adam.leaves, strict=True):
        if leaf.spec is None:
            assert leaf.state_bytes == plain.state_bytes
    return report.leaves


@pytest.mark.parametrize("mode", ["weight_norm", "lookahead"])
def test_weight_normalisation_is_for_the_leaves_that_are_projected(mode):
    """And no other: the axes of a leaf alone do not say whether it is."""
    params = abstract({**QUERY, **DENSE})
    tx = oxs.grad_norm_lorp(1e-3, oxs.LowRank(128), mode=mode)
    alone = oxs.grad_norm_lorp(
        1e-3, oxs.rules(("query", None), default=oxs.LowRank(128)), mode=mode
    )
    got, expected = (jax.eval_shape(x.init, params) for x in (tx, alone))
    assert got == expected
    if mode == "weight_norm":
        assert [x.size for x in jax.tree.leaves(got)] == [x.size for x in jax.tree.leaves(expected)]
        assert (512, 8) not in [x.shape for x in jax.tree.leaves(got)]
