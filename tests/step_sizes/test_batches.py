"""Gradient noise, batch sizes and learning rates for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import GOLDEN, REORDERED, SAMPLED, assert_close

import optax_structured as oxs
from optax_structured.step_sizes import (
    BatchSizeController,
    decaying_normalized_step,
    fit_critical_batch,
    gradient_noise_stats,
    microbatch_noise_stats,
    minibatch_eigenvalue,
    pooled_variance,
    scale_by_adagrad_norm,
    scale_by_batch_size,
    scale_decay,
    scale_learning_rate,
    suggest_batch,
)

FILES = names("adadagrad-")
CLOSE = functools.partial(np.testing.assert_allclose, rtol=REORDERED["float64"])


@pytest.mark.parametrize("name", [n for n in FILES if load(n).leaves("per_sample")])
def test_golden_noise(name, x64):
    golden = load(name)
    meta, code, exact = golden.meta, golden.meta["code"], golden.meta["exact_global"]
    grads = jax.tree.map(jnp.asarray, golden.leaves("per_sample"))
    stats = gradient_noise_stats(grads, "augmented")
    levels = {key: meta[key] for key in ("eta", "theta", "nu")}
    suggest = lambda s, *keys: suggest_batch(s, **{k: levels[k] for k in keys})  # noqa: E731
    found = (stats.var, stats.grad_sq, stats.inner_var, stats.orth_var)
    published = [code["norm"]["var_l1"], code["norm"]["grad_sq"]]
    published += [exact["var_ip"], exact["var_orth"]]
    np.testing.assert_allclose(found, published, rtol=GOLDEN)
    assert suggest(stats, "eta") == code["norm"]["next_batch"]
    assert suggest(stats, "theta") == exact["next_batch_ip"]
    assert suggest(stats, "nu") == exact["next_batch_orth"]
    as_code = gradient_noise_stats(grads, "augmented", per_leaf=True)
    found = (as_code.inner_var, as_code.orth_var)
    published = (code["augmented"]["var_ip"], code["augmented"]["var_orth"])
    np.testing.assert_allclose(found, published, rtol=GOLDEN)
    assert suggest(as_code, "theta", "nu") == code["augmented"]["next_batch"]


@pytest.mark.parametrize("name", [n for n in FILES if "params0" in "".join(load(n).arrays)])
def test_golden_row_norms(name, x64):
    """The published optimizer is ours per output row; a bias joins the row of the weight before."""
    golden = load(name)
    h = golden.meta["hyper"]
    assert h["momentum"] == h["lr_decay"] == h["weight_decay"] == 0
    element = scale_by_adagrad_norm(h["initial_accumulator_value"], eps=1e-10)
    step = jax.jit(jax.vmap(lambda g, state: element.update(g, state)))
    pairs, weight = {}, None
    for leaf in golden.meta["leaf_order"]:
        weight = leaf if golden.start[leaf].ndim in (2, 4) else weight
        pairs[leaf] = (leaf,) if leaf == weight or weight is None else (leaf, weight)
    params = dict(golden.start)
    states = {leaf: jax.vmap(element.init)(params[leaf]) for leaf in params}
    for t, grads in enumerate(golden.steps("grads")):
        for leaf, together in pairs.items():
            updates, states[leaf] = step({k: jnp.asarray(grads[k]) for k in together}, states[leaf])
            params[leaf] = params[leaf] - h["lr"] * np.asarray(updates[leaf])
        for leaf, published in golden.leaves("params").items():
            np.testing.assert_allclose(params[leaf], published[t], rtol=GOLDEN, atol=GOLDEN)


def noisy(batch=12, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0))
    g = {"w": jax.random.normal(keys[0], (batch, 3, 2), dtype)}
    return g | {"b": 1 + jax.random.normal(keys[1], (batch,), dtype)}


@pytest.mark.slow
def test_identities_of_the_tests(x64):
    g = noisy()
    stats = gradient_noise_stats(g, "augmented")
    CLOSE(stats.var, stats.inner_var / stats.grad_sq + stats.orth_var)
    order = jax.random.permutation(jax.random.key(1), 12)
    permuted = gradient_noise_stats(jax.tree.map(lambda x: x[order], g), "augmented")
    CLOSE(permuted, stats)
    scaled = gradient_noise_stats(jax.tree.map(lambda x: 1e3 * x, g), "augmented")
    for test in ({"eta": 0.1}, {"theta": 0.2}, {"theta": 0.1, "nu": 0.2}):
        assert suggest_batch(scaled, **test) == suggest_batch(stats, **test) > 12


def test_equal_examples_keep_the_batch():
    stats = gradient_noise_stats(jnp.ones((5, 3)), "augmented")
    assert stats.var == 0
    assert suggest_batch(stats, eta=0.1, theta=0.1, nu=0.1) == 5
    nothing = gradient_noise_stats(jnp.zeros((5, 3)), "augmented")
    assert suggest_batch(nothing, eta=0.1, theta=0.1, nu=0.1) == 5
    opposite = gradient_noise_stats(jnp.array([[1.0], [-1.0]]))
    assert suggest_batch(opposite, eta=0.1, maximum=77) == 77
    assert suggest_batch(opposite, eta=0.1) == 2**30


@pytest.mark.slow
def test_examples_on_devices_and_in_groups(x64):
    g = noisy()
    stats = gradient_noise_stats(g, "augmented")
    split = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[1:]), g)
    spread = jax.vmap(lambda g: gradient_noise_stats(g, "augmented", axis_name="i"), axis_name="i")(
        split
    )
    for found, expected in zip(spread, stats, strict=True):
        CLOSE(found, expected)
    within = jax.vmap(lambda g: gradient_noise_stats(g).var)(split)
    CLOSE(pooled_variance(within, jax.tree.map(lambda x: x.mean(1), split), size=4), stats.var)
    CLOSE(pooled_variance(within[:1], jax.tree.map(lambda x: x.mean(1)[:1], split), 4), within[0])


@pytest.mark.slow
def test_microbatches_are_unbiased():
    """Over random draws; V is 6 and the squared gradient 0 for standard normal gradients."""
    draws = jax.random.normal(jax.random.key(2), (4000, 5, 8, 6))
    stats = jax.vmap(lambda g: microbatch_noise_stats(g.mean(1), 8))(draws)
    assert float(stats.var.mean()) == pytest.approx(6.0, rel=SAMPLED)
    assert abs(float(stats.signal.mean())) < SAMPLED
    assert stats.batch[0] == 40


def test_controller_grows_by_powers_of_two():
    control = BatchSizeController(microbatch=3, devices=2, maximum=50, interval=4)
    assert [control.batch(n) for n in (1, 6, 7, 24, 1000)] == [6, 6, 12, 24, 48]
    assert [control.grow(12, n) for n in (5, 12, 13, 1000)] == [12, 12, 24, 24]
    assert BatchSizeController(3, 50, growth=None).grow(3, 1000) == 48
    assert [control.due(step, 6) for step in (0, 1, 4)] == [True, False, True]
    assert not control.due(4, 48)
    assert control.every(24) == 4


@pytest.mark.slow
def test_controller_and_accumulate_make_the_large_batch():
    """The state goes on when `every` changes, and each step is one with the whole batch."""
    control = BatchSizeController(microbatch=2, maximum=8)
    X = jax.random.normal(jax.random.key(3), (14, 3))
    loss = lambda w, X: jnp.mean((X @ w - 1) ** 2)  # noqa: E731
    inner = optax.adam(0.1)
    w, batch, at = jnp.zeros(3), 2, 0
    state = oxs.accumulate(inner, 1).init(w)
    plain, inner_state = w, inner.init(w)
    while at + batch <= len(X):
        for _ in range(control.every(batch)):
            optimizer = oxs.accumulate(inner, control.every(batch))
            micro = X[at : at + 2]
            at += 2
            updates, state = optimizer.update(jax.grad(loss)(w, micro), state, w)
            w = optax.apply_updates(w, updates)
        updates, inner_state = inner.update(
            jax.grad(loss)(plain, X[at - batch : at]), inner_state, plain
        )
        plain = optax.apply_updates(plain, updates)
        batch = control.grow(batch, 100)
    assert batch == 8
    assert_close(w, plain, REORDERED["float32"])


def test_one_number_is_rss():
    gradients = jnp.array([1.0, -2.0, 0.5])
    ours, theirs = scale_by_adagrad_norm(0.3), optax.scale_by_rss(0.3, eps=0.0)
    a, b = ours.init(jnp.zeros(())), theirs.init(jnp.zeros(()))
    for g in gradients:
        u, a = ours.update(g, a)
        v, b = theirs.update(g, b)
        assert_close(u, v, REORDERED["float32"])
    u, after = ours.update(jnp.array(jnp.nan), a)
    assert after.total == a.total


RULES = [("linear", None), ("linear", 100.0), ("sqrt", None), ("sqrt", 100.0), ("none", 7.0)]


@pytest.mark.parametrize("rule, critical", RULES)
@pytest.mark.parametrize("size", [None, 5000])
def test_rates_compose(rule, critical, size):
    scale = functools.partial(
        scale_learning_rate, rule=rule, critical_batch=critical, dataset_size=size
    )
    CLOSE(scale(0.1, 32, 32), 0.1)
    CLOSE(scale(scale(0.1, 32, 256), 256, 1024), scale(0.1, 32, 1024))
    element = scale_by_batch_size(32, rule, critical_batch=critical, dataset_size=size)
    update = jax.jit(lambda b: element.update(jnp.ones(()), element.init(None), batch_size=b)[0])
    np.testing.assert_allclose(update(jnp.array(256.0)), scale(1.0, 32, 256), rtol=1e-5)


def test_limits_of_the_critical_batch():
    scale = functools.partial(scale_learning_rate, 0.1, 32)
    CLOSE(scale(96, critical_batch=np.inf), 0.3)
    CLOSE(scale(96, critical_batch=0.0), 0.1)
    CLOSE(scale(1e15, critical_batch=96.0), 0.4)
    CLOSE(scale(500, critical_batch=96.0, dataset_size=500), 0.1 * (1 + 96 * (1 / 32 - 1 / 500)))
    CLOSE(scale(64, "sqrt"), 0.1 * 2**0.5)
    CLOSE(scale_learning_rate(lambda t: 0.1 * t, 32, 64)(3), 0.6)
    CLOSE(scale_decay(0.99, 32, 64), 0.98)


@pytest.mark.parametrize("eigenvalue, rho", [(4.0, 1.5), (0.5, 2.0)])
def test_eigenvalue_against_a_random_matrix(eigenvalue, rho):
    P = 1000
    noise = np.random.default_rng(0).standard_normal((P, P)) * rho / np.sqrt(P)
    matrix = (noise + noise.T) / np.sqrt(2)
    matrix[0, 0] += eigenvalue
    top = np.linalg.eigvalsh(matrix)[-1]
    assert minibatch_eigenvalue(eigenvalue, rho**2 * 10, batch=10) == pytest.approx(top, rel=0.03)


def test_critical_batch_is_found_again():
    batches = [8, 32, 128]
    found = fit_critical_batch([2.0 * (1 + 50 / b) for b in batches], batches)
    CLOSE(found, (2.0, 50.0))


MISUSE = {
    "kind": (lambda: gradient_noise_stats(jnp.ones((2, 2)), "outer"), "kind must be one of"),
    "one": (lambda: gradient_noise_stats(jnp.ones((1, 2))), "takes two examples at least, got 1"),
    "no_test": (lambda: suggest_batch(gradient_noise_stats(jnp.ones((2, 2)))), "needs a test"),
    "not_computed": (
        lambda: suggest_batch(gradient_noise_stats(jnp.ones((2, 2))), theta=0.1),
        "theta needs a variance: gradient_noise_stats.*kind='inner'",
    ),
    "controller": (lambda: BatchSizeController(8, 4), "maximum must hold a microbatch on each"),
    "growth": (lambda: BatchSizeController(8, 64, growth=1.5), "growth must be at least 2 or None"),
    "rule": (lambda: scale_learning_rate(0.1, 1, 2, "cubic"), "rule must be one of"),
    "size": (lambda: scale_learning_rate(0.1, 32, 100, dataset_size=50), "batch must be above 0"),
    "whole": (lambda: scale_learning_rate(0.1, 5, 50, dataset_size=50), "give critical_batch too"),
    "no_size": (
        lambda: scale_by_batch_size(32).update(jnp.ones(2), optax.EmptyState()),
        "needs the batch size of the step: call update",
    ),
    "fit": (lambda: fit_critical_batch([1.0, 2.0], [10, 20]), "do not fall to a limit above 0"),
    "fit_one": (lambda: fit_critical_batch([1.0], [10]), "needs two batch sizes"),
    "decay": (lambda: scale_decay(0.9, 32, 640), "at most 320"),
    "init": (lambda: decaying_normalized_step(-1.0, 0.9), "init must be a finite number of at"),
    "accumulator": (lambda: scale_by_adagrad_norm(0.0), "initial_accumulator must be a finite"),
}


@pytest.mark.parametrize("make, message", MISUSE.values(), ids=MISUSE)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
