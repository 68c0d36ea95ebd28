"""Modular adaptive training: tangent kernels of modules, and who is updated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_structured.curvature import (
    mask_modules,
    mntk_eigenvalues,
    modular_adaptive,
    output_kernel,
    select_modules,
    temporal_stop,
)

LABELS = {"a": "first", "b": {"w": "second", "c": "second"}}


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    normal = jax.random.normal
    return {
        "a": normal(keys[0], (3, 2)),
        "b": {"w": normal(keys[1], (2, 2)), "c": normal(keys[2], (2,))},
    }


X = jax.random.normal(jax.random.key(1), (5, 3))


def outputs(w):
    return jnp.tanh(X @ w["a"]) @ w["b"]["w"] + w["b"]["c"]


@pytest.mark.slow
def test_eigenvalues_are_those_of_the_kernels_which_add_up():
    w = params()
    found = mntk_eigenvalues(outputs, w, LABELS, jax.random.key(0), iterations=40)
    first = output_kernel(lambda a: outputs(w | {"a": a}), w["a"])
    second = output_kernel(lambda b: outputs(w | {"b": b}), w["b"])
    np.testing.assert_allclose(first + second, output_kernel(outputs, w), rtol=1e-4, atol=1e-5)
    for name, kernel in {"first": first, "second": second}.items():
        np.testing.assert_allclose(found[name], jnp.linalg.eigvalsh(kernel)[-1], rtol=1e-4)
    scaled = mntk_eigenvalues(lambda w: 3 * outputs(w), w, LABELS, jax.random.key(0), iterations=40)
    for name in found:
        np.testing.assert_allclose(scaled[name], 9 * found[name], rtol=1e-4)
    again = mntk_eigenvalues(outputs, w, LABELS, jax.random.key(1), iterations=40)
    for name in found:
        np.testing.assert_allclose(again[name], found[name], rtol=1e-4)
    for alpha, mode in ((0.3, "relative"), (0.5, "quantile"), (0.0, "relative")):
        chosen = select_modules(found, alpha, mode)
        assert chosen == select_modules(scaled, alpha, mode)
        assert alpha > 0 or all(chosen.values())


def test_quantiles_keep_a_share():
    values = {name: jnp.asarray(x) for name, x in zip("abcd", (3.0, 1.0, 4.0, 2.0), strict=True)}
    kept = {name for name, on in select_modules(values, 0.3, "quantile").items() if on}
    assert kept == {"a", "c"}
    ten = {str(i): jnp.asarray(float(i)) for i in range(10)}
    assert sum(map(int, select_modules(ten, 0.7, "quantile").values())) == 7
    traced = jax.jit(lambda alpha: select_modules(values, alpha, "quantile"))(0.3)
    assert {name for name, on in traced.items() if on} == kept


def test_inactive_modules_do_not_change_at_all():
    w = params()
    optimizer = mask_modules(optax.adam(0.1), LABELS)
    update = jax.jit(
        lambda g, s, w, on: optimizer.update(g, s, w, active={"first": on, "second": True})
    )
    state = optimizer.init(w)
    _, state = update(w, state, w, True)
    updates, after = update(w, state, w, False)
    np.testing.assert_array_equal(updates["a"], 0)
    assert jnp.all(updates["b"]["w"] != 0)
    for moment in ("mu", "nu"):
        old, new = (optax.tree.get(s, moment) for s in (state, after))
        np.testing.assert_array_equal(new["a"], old["a"])
        assert jnp.any(new["b"]["w"] != old["b"]["w"])


def test_one_module_is_ordinary_training():
    w = params()
    labels = jax.tree.map(lambda _: "all", w)
    ours, plain = modular_adaptive(optax.adam(0.1), labels), optax.adam(0.1)
    by_function = modular_adaptive(optax.adam(0.1), lambda w: jax.tree.map(lambda _: "all", w))
    u, _ = by_function.update(w, by_function.init(w), w)
    v, _ = ours.update(w, ours.init(w), w)
    jax.tree.map(np.testing.assert_array_equal, u, v)
    u, _ = ours.update(w, ours.init(w), w, eigenvalues={"all": jnp.array(2.0)})
    v, _ = plain.update(w, plain.init(w), w)
    jax.tree.map(np.testing.assert_array_equal, u, v)


def test_modules_pause_and_stop():
    """Below the threshold a module pauses and returns; one that stopped to change is out."""
    w = params()
    optimizer = modular_adaptive(optax.sgd(1.0), LABELS, alpha=0.1, beta=0.01)
    state = optimizer.init(w)
    update = jax.jit(lambda s, e: optimizer.update(w, s, w, eigenvalues=e)[1])
    history = [(1.0, 1.0), (2.0, 0.01), (5.0, 3.0), (5.001, 9.0), (5.002, 20.0)]
    active = []
    for first, second in history:
        state = update(state, {"first": jnp.array(first), "second": jnp.array(second)})
        active.append((bool(state.active["first"]), bool(state.active["second"])))
    assert active == [(True, True), (True, False), (True, True), (False, True), (False, True)]
    assert bool(state.frozen["first"])
    assert not bool(state.frozen["second"])
    assert not temporal_stop(0.0, 0.0, 0.0, 1e-3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: select_modules({"a": jnp.ones(())}, 2.0), r"alpha must be in \[0, 1\]"),
        (lambda: select_modules({"a": jnp.ones(())}, 0.1, "best"), "mode must be 'relative'"),
        (
            lambda: modular_adaptive(optax.sgd(0.1), LABELS, beta=-1.0),
            "beta must be a finite number of",
        ),
        (
            lambda: mask_modules(optax.sgd(0.1), LABELS).update(params(), None, params()),
            r"needs to know which of \['first', 'second'\] are active",
        ),
        (
            lambda: modular_adaptive(optax.sgd(0.1), LABELS).update(
                params(),
                modular_adaptive(optax.sgd(0.1), LABELS).init(params()),
                params(),
                eigenvalues={"third": 1.0},
            ),
            r"must be of the modules \['first', 'second'\], got \['third'\]",
        ),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
