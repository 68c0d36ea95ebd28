"""Norms that span leaves: the prox is that of one matrix, in any metric and layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close, rounding

import optax_structured as oxs
from optax_structured.diagnostics import objective, stationarity, strength_max, structured_sparsity
from optax_structured.regularizers.coupled import joined

UNITS = 3
# A kernel that writes the units, a bias, stacked kernels with two entries a unit, one that reads.
STRUCTURE = oxs.rules(
    ("up", oxs.CoupledGroupLasso("hidden", 1, UNITS)),
    ("bias", oxs.CoupledGroupLasso("hidden", -1, UNITS)),
    ("stacked", oxs.CoupledGroupLasso("hidden", -2, UNITS, inner=2)),
    ("flat", oxs.CoupledGroupLasso("hidden", 0, UNITS)),
    default=None,
)
SHAPES = {"up": (4, 3), "bias": (3,), "stacked": (2, 6, 2), "flat": (9, 2), "head": (2, 2)}


def leaves(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=n) * scale) for name, n in SHAPES.items()}


def unit(params, u):
    """By hand: what one unit has."""
    up, bias, stacked, flat = (np.asarray(params[k]) for k in ("up", "bias", "stacked", "flat"))
    parts = up[:, u], bias[u], stacked[:, 2 * u : 2 * u + 2], flat[[u, u + 3, u + 6]]
    return np.concatenate([np.ravel(part) for part in parts])


def test_rows_are_the_units_and_lead_back():
    with jax.enable_x64():
        params = leaves(0)
        names = list(params)
        (joint,) = joined(
            [STRUCTURE.tree(params)[name] for name in names], [SHAPES[name] for name in names]
        )
        matrix = joint.matrix([params[name] for name in names])
        for u in range(UNITS):
            np.testing.assert_array_equal(np.sort(matrix[u]), np.sort(unit(params, u)))
        for place, leaf in joint.leaves(matrix):
            np.testing.assert_array_equal(leaf, params[names[place]])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ramda", "prox_adam", "rmda", "sgd"])
def test_a_step_is_optimal_over_all_leaves(recipe):
    """Zero iff the norm of all that a unit has is below the threshold, in the metric of a step."""
    make = {
        "ramda": lambda s: oxs.ramda(0.5, STRUCTURE, s, momentum=0.0),
        "prox_adam": lambda s: oxs.prox_adam(0.5, STRUCTURE, s),
        "rmda": lambda s: oxs.rmda(0.5, STRUCTURE, s, momentum=0.0),
        "sgd": lambda s: oxs.prox_sgd(0.5, STRUCTURE, s, momentum=0.0),
    }[recipe]
    with jax.enable_x64():
        params, grads = leaves(1), leaves(2)
        free, _ = (tx := make(0.0)).update(grads, tx.init(params), params)
        plain = jax.tree.map(jnp.add, params, free)
        kept = dict.fromkeys(range(UNITS), 0)
        for strength in np.geomspace(1e-2, 2.0, 8):
            tx = make(strength)
            updates, _ = tx.update(grads, tx.init(params), params)
            found = jax.tree.map(jnp.add, params, updates)
            np.testing.assert_array_equal(found["head"], plain["head"])
            for u in range(UNITS):
                alive = unit(found, u) != 0
                assert alive.all() or not alive.any()  # a unit lives or dies in all leaves
                kept[u] += alive.all()
        assert min(kept.values()) < 8  # something died
        assert max(kept.values()) > 0


def test_the_prox_is_that_of_one_matrix():
    with jax.enable_x64():
        params, metric = leaves(1), jax.tree.map(lambda x: 1 + x * x, leaves(2))
        names = [name for name in params if name != "head"]
        specs = [STRUCTURE.tree(params)[name] for name in names]
        (joint,) = joined(specs, [SHAPES[name] for name in names])
        u, m = (joint.matrix([tree[name] for name in names]) for tree in (params, metric))
        strength = 0.3
        w = joint.regularizer.prox(u, m, strength)
        assert 0 < int(joint.regularizer.support(w).sum())
        norms = np.linalg.norm(w, axis=1, keepdims=True)
        # 0 = m (w - u) + strength * weight * w / |w|
        slope = strength * np.sqrt(w.shape[1]) * w / np.where(norms == 0, 1.0, norms)
        residual = np.where(norms == 0, 0.0, m * (w - u) + slope)
        np.testing.assert_allclose(residual, 0.0, atol=1e-9)


def test_diagnostics_see_units():
    params = {name: leaf.astype(jnp.float32) for name, leaf in leaves(3).items()}
    weight = np.sqrt(unit(params, 0).size)
    norms = [np.linalg.norm(unit(params, u)) for u in range(UNITS)]
    close = rounding("float32") * 10
    assert_close(objective(0.0, params, STRUCTURE, 2.0), 2 * weight * np.sum(norms), close)
    assert_close(strength_max(params, STRUCTURE), np.max(norms) / weight, close)
    one_dead = params | {"up": params["up"].at[:, 0].set(0)}  # alive elsewhere
    assert structured_sparsity(one_dead, STRUCTURE) == 0
    zero = jax.tree.map(jnp.zeros_like, params)
    assert stationarity(zero, params | {"head": zero["head"]}, STRUCTURE, np.max(norms)) == 0


def test_one_leaf_alone_is_a_group_lasso():
    w, metric = leaves(4)["up"], 1 + leaves(5)["up"] ** 2
    alone, lasso = oxs.CoupledGroupLasso("hidden", 1, UNITS), oxs.GroupLasso(1)
    for f in ("value", "support", "dual_norm"):
        np.testing.assert_allclose(getattr(alone, f)(w), getattr(lasso, f)(w), rtol=1e-6)
    found, expected = (r.prox(w, metric, 0.4) for r in (alone, lasso))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_axis_that_does_not_hold_the_units_is_refused():
    structure = oxs.rules(("up", oxs.CoupledGroupLasso("hidden", 1, 2)), default=None)
    with pytest.raises(ValueError, match="2 units of 1 entries do not divide"):
        oxs.prox_sgd(0.1, structure, 1.0).init({"up": jnp.ones((4, 3))})
