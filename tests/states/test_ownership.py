"""An array belongs to a parameter if it is gone from the state when the parameter is."""

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import optax_structured as oxs
from optax_structured.states import owners

KERNEL, BIAS = jnp.ones((4, 6)), jnp.ones(6)
TREES = {
    "dictionary": {"a": {"kernel": KERNEL, "bias": BIAS}, "kernel": KERNEL},
    "names of fields and settings": {"count": KERNEL, "mu": KERNEL, "b1": KERNEL, "scale": BIAS},
    "list": [KERNEL, KERNEL, BIAS],
    "tuple": (KERNEL, KERNEL),
    "holes": {"a": KERNEL, "b": None, "c": [optax.MaskedNode(), KERNEL]},
}
HALF = oxs.LowRank(rank=2)


def matrices(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "other", params)


def not_for_placeholders(params):
    assert isinstance(params, dict | list | tuple | jax.Array | jax.ShapeDtypeStruct)
    return matrices(params)


TRANSFORMATIONS = {
    "adamw": optax.adamw(1e-3),
    "injected adam": optax.inject_hyperparams(optax.adam)(1e-3),
    "injected galore": optax.inject_hyperparams(oxs.galore)(1e-3, HALF, weight_decay=0.1),
    "masked inside galore": oxs.galore(
        1e-3, HALF, inner=optax.masked(optax.trace(0.9), lambda p: dict.fromkeys(p, True))
    ),
    "multi steps": optax.MultiSteps(optax.adam(1e-3), 2),
    "masked": optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "partition": optax.partition({"matrix": oxs.fira(1e-3, HALF), "other": optax.sgd(1)}, matrices),
    "labels of a real tree only": optax.partition(
        {"matrix": optax.adam(1e-3), "other": optax.sgd(1e-3, 0.9)}, not_for_placeholders
    ),
    "schedule free": contrib.schedule_free_adamw(1e-3),
    "muon": contrib.muon(1e-3),
    "prodigy": contrib.prodigy(),
    "factored": optax.adafactor(1e-3),
    "line search": optax.chain(optax.adam(1e-3), optax.scale_by_backtracking_linesearch(3)),
    "quantized": oxs.quantized(optax.adam(1e-3), oxs.Dynamic(block=2), min_size=2),
    "quantized galore": oxs.quantized(oxs.galore(1e-3, HALF), oxs.Dynamic(block=2), min_size=2),
    "q_galore": oxs.q_galore(1e-3, HALF),
    "ramda": oxs.ramda(1e-3, oxs.L1(), 1e-3),
    "restarted": oxs.restart_at(oxs.prox_adam(1e-3, amsgrad=True), (2,)),
    "accumulated": oxs.accumulate(oxs.apollo(1e-3, HALF), 2),
    "trion": oxs.trion(1e-3, HALF),
    "ldadam": oxs.ldadam(1e-3, HALF),
    "grad_norm_lorp": oxs.grad_norm_lorp(1e-3, HALF),
    "lookahead": oxs.grad_norm_lorp(1e-3, HALF, mode="lookahead"),
    "classical": oxs.transforms.weight_normalized(optax.sgd(1.0), optax.adam(1.0), classical=True),
}


def paths(tree):
    return [path for path, _ in jax.tree.leaves_with_path(tree)]


def by_removal(tx, params):
    everything = paths(jax.eval_shape(tx.init, params))
    leaves, structure = jax.tree.flatten(params)
    found = dict.fromkeys(everything)
    for i in range(len(leaves)):
        without = structure.unflatten([*leaves[:i], None, *leaves[i + 1 :]])
        left = paths(jax.eval_shape(tx.init, without))
        found.update(dict.fromkeys(set(everything) - set(left), i))
    return [found[path] for path in everything]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_owners(name, tree):
    tx, params = TRANSFORMATIONS[name], TREES[tree]
    got = owners(tx, jax.eval_shape(tx.init, params), params)
    assert got == by_removal(tx, params)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_single_array_owns_what_is_not_shared(name):
    tx, pair = TRANSFORMATIONS[name], [KERNEL, KERNEL]
    of_two = owners(tx, jax.eval_shape(tx.init, pair), pair)
    of_one = owners(tx, jax.eval_shape(tx.init, KERNEL), KERNEL)
    assert of_one == [owner for owner in of_two if owner != 1]


@pytest.mark.slow
def test_codes_belong_to_the_leaf_they_stand_for():
    tx = oxs.quantized(optax.adam(1e-3), oxs.Dynamic(block=2), min_size=2)
    params = [KERNEL, BIAS]
    assert owners(tx, tx.init(params), params) == [None, None, None, 0, 0, 1, 1, 0, 0, 1, 1]


def test_a_mask_of_whole_subtrees():
    params = {"encoder": {"kernel": KERNEL, "bias": BIAS}, "head": KERNEL}
    tx = optax.masked(optax.trace(0.9), {"encoder": False, "head": True})
    assert owners(tx, tx.init(params), params) == [2]


def test_an_array_of_several_parameters_belongs_to_none():
    params = {"a": KERNEL, "b": BIAS}
    tx = optax.flatten(optax.trace(0.9))
    assert owners(tx, tx.init(params), params) == [None]
