"""Hessian alignment: the published penalties, and the closed form of a linear head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from tolerances import CERTIFIED, GOLDEN, reordered

from optax_structured.contrib.losses import (
    hessian_alignment_penalty,
    linear_head_alignment_penalty,
    rademacher,
    softmax_head,
)

FILES = sorted(path.stem for path in FOLDER.glob("hessian_alignment-*.npz"))


def mlp(params, x, activation):
    """`0.weight`, `0.bias`, `2.weight`, ... with an activation between, or one `weight`, `bias`."""
    layers = sorted({name.rpartition(".")[0] for name in params})
    for i, layer in enumerate(layers):
        name = lambda leaf, layer=layer: f"{layer}.{leaf}" if layer else leaf  # noqa: E731
        x = activation(x) if i else x
        x = x @ params[name("weight")].T + params[name("bias")]
    return x


def part(params, name):
    prefix = name + "."
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def head_loss(head, environment):
    logits = mlp(head, environment["features"], jax.nn.relu)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, environment["labels"])
    return jnp.sum(losses * environment["weights"]) / jnp.sum(environment["weights"])


def padded(golden):
    """All environments with one leading axis, the smaller ones filled up with weight 0."""
    inputs, count = golden.leaves("inputs"), golden.meta["environments"]
    most = max(len(inputs[f"x{e}"]) for e in range(count))

    def fill(x):
        return np.pad(x, [(0, most - len(x))] + [(0, 0)] * (x.ndim - 1))

    def stack(arrays):
        return jnp.asarray(np.stack([fill(x) for x in arrays]))

    x, y = ([inputs[f"{name}{e}"] for e in range(count)] for name in "xy")
    return stack(x), stack(y), stack([np.ones(len(rows)) for rows in x])


def probes_of(golden, head):
    flat, out = golden.arrays["inputs/probes"], {}
    for name in golden.meta["classifier_order"]:
        size = head[name].size
        out[name] = jnp.asarray(flat[..., :size].reshape(*flat.shape[:2], *head[name].shape))
        flat = flat[..., size:]
    return out


@pytest.mark.parametrize("name", FILES)
def test_golden(name, x64):
    golden = load(name)
    start = {k: jnp.asarray(v) for k, v in golden.start.items()}
    x, labels, weights = padded(golden)
    how = {"alpha": golden.meta["penalty_alpha"], "beta": golden.meta["penalty_beta"]}
    methods = {key.split("/")[0] for key in golden.leaves("outputs")}

    def loss(params, method):
        features = jnp.tanh(mlp(part(params, "featurizer"), x, jnp.tanh))
        head = part(params, "classifier")
        environments = {"features": features, "labels": labels, "weights": weights}
        probes = probes_of(golden, head) if method == "hutchinson" else None
        nll = jnp.mean(jax.vmap(head_loss, (None, 0))(head, environments))
        penalty = hessian_alignment_penalty(
            head_loss, head, environments, method=method, probes=probes, **how
        )
        return nll + penalty, (nll, penalty)

    for method in methods:
        out = golden.leaves(f"outputs/{method}")
        (total, (nll, penalty)), grads = jax.jit(
            jax.value_and_grad(functools.partial(loss, method=method), has_aux=True)
        )(start)
        published = [out["loss"], out["nll"], out["penalty"]]
        np.testing.assert_allclose([total, nll, penalty], published, rtol=GOLDEN)
        for leaf, want in golden.leaves(f"outputs/{method}/grad").items():
            scale = GOLDEN * np.abs(want).max()
            np.testing.assert_allclose(grads[leaf], want, rtol=0, atol=scale)


def linear(seed=0, environments=3, n=7, d=4, classes=3):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    head = {"kernel": draw(d, classes), "bias": draw(classes)}
    labels = jnp.asarray(rng.integers(classes, size=(environments, n)))
    weights = jnp.asarray(rng.random((environments, n)) < 0.8, float).at[:, 0].set(1.0)
    return head, {"features": draw(environments, n, d), "labels": labels, "weights": weights}


def linear_loss(head, data):
    logits = data["features"] @ head["kernel"] + head["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"])
    return jnp.sum(losses * data["weights"]) / jnp.sum(data["weights"])


autodiff = jax.jit(
    functools.partial(hessian_alignment_penalty, linear_loss),
    static_argnames=("method", "reference"),
)


def closed_form(head, data, **how):
    features, labels, weights = data["features"], data["labels"], data["weights"]
    return linear_head_alignment_penalty(
        head["kernel"], head["bias"], features, labels, weights=weights, **how
    )


def assert_same(f, g, args):
    """One value and one gradient, in parameters and features."""
    head, data = args
    by = lambda fn: jax.jit(  # noqa: E731
        jax.value_and_grad(lambda h, x: fn(h, data | {"features": x}), argnums=(0, 1))
    )(head, data["features"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=GOLDEN, atol=GOLDEN), by(f), by(g)
    )


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["mean_loss", "mean_product"])
def test_closed_form_of_gradient_products(reference, x64):
    how = {"alpha": 0.7, "beta": 0.3, "method": "hgp", "reference": reference}
    assert_same(
        lambda head, data: closed_form(head, data, **how),
        lambda head, data: hessian_alignment_penalty(linear_loss, head, data, **how),
        linear(),
    )


def hessians(head, data):
    flat, unravel = jax.flatten_util.ravel_pytree(head)
    return jax.vmap(jax.hessian(lambda p, d: linear_loss(unravel(p), d)), (None, 0))(flat, data)


def test_closed_form_of_the_diagonal_and_of_the_whole_hessian(x64):
    def diagonal(head, data):
        d = jnp.diagonal(hessians(head, data), axis1=1, axis2=2)
        return jnp.mean(jnp.sum((d - jax.lax.stop_gradient(d.mean(0))) ** 2, 1))

    def frobenius(head, data):
        h = hessians(head, data)
        return jnp.mean(jnp.sum((h - jax.lax.stop_gradient(h.mean(0))) ** 2, (1, 2)))

    for method, exact in (("diagonal", diagonal), ("frobenius", frobenius)):
        how = {"alpha": 1.0, "beta": 0.0, "method": method}
        assert_same(functools.partial(closed_form, **how), exact, linear())


def test_all_sign_patterns_average_to_the_exact_diagonal(x64):
    """The limit of many probes, without its noise: every sign vector of a small head."""
    head, data = linear(d=2, classes=2)
    flat, unravel = jax.flatten_util.ravel_pytree(head)
    signs = jnp.stack(jnp.meshgrid(*[jnp.array([-1.0, 1.0])] * flat.size), -1)
    probes = jax.vmap(unravel)(signs.reshape(-1, flat.size))
    how = {"alpha": 0.7, "beta": 0.3}
    exact = jax.jit(functools.partial(closed_form, method="diagonal", **how))(head, data)
    got = autodiff(head, data, method="hutchinson", probes=probes, **how)
    np.testing.assert_allclose(got, exact, rtol=GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hgp", "hutchinson", "diagonal", "frobenius"])
def test_environments_that_are_alike_cost_nothing(method):
    head, data = linear()
    alike = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), data)
    how = {"alpha": 1.0, "beta": 1.0, "method": method}
    if method == "hutchinson":
        how["probes"] = rademacher(jax.random.key(0), head, 5)
    penalty = (
        autodiff
        if method in ("hgp", "hutchinson")
        else jax.jit(closed_form, static_argnames="method")
    )
    np.testing.assert_allclose(penalty(head, alike, **how), 0.0, atol=1e-6)
    assert penalty(head, data, **how) > 1e-3


def test_independent_probes_add_noise_to_the_difference():
    head, data = linear()
    alike = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), data)
    probes = rademacher(jax.random.key(0), head, 5, environments=3)
    how = {"alpha": 1.0, "beta": 0.0, "method": "hutchinson", "probes": probes}
    noise = autodiff(head, alike, **how)
    assert noise > 1e-3
    assert 0 < autodiff(head, alike, reference="mean_product", **how) < noise


def test_product_is_the_published_norm_trick_and_finite_where_that_is_nan():
    head, data = linear(environments=1)
    one = jax.tree.map(lambda x: x[0], data)
    flat, unravel = jax.flatten_util.ravel_pytree(head)
    norm = lambda p: jnp.linalg.norm(jax.grad(lambda q: linear_loss(unravel(q), one))(p))  # noqa: E731
    rows = softmax_head(
        head["kernel"], head["bias"], *(one[k] for k in ("features", "labels", "weights"))
    )
    published = unravel(norm(flat) * jax.jit(jax.grad(norm))(flat))
    got = rows.product(rows.gradient())
    np.testing.assert_allclose(got[:-1], published["kernel"], atol=1e-6)
    np.testing.assert_allclose(got[-1], published["bias"], atol=1e-6)

    def flat_loss(head, environment):
        return jnp.sum(jnp.square(head)) * environment

    penalty = functools.partial(hessian_alignment_penalty, flat_loss, alpha=1.0, beta=1.0)
    at_zero = jax.jit(jax.value_and_grad(penalty))(jnp.zeros(3), jnp.ones(2))
    assert all(jnp.all(jnp.isfinite(x)) for x in at_zero)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hgp", "diagonal", "frobenius"])
def test_float32_jit_and_vmap(method, x64):
    """A steep head, p within rounding of 0 and 1, in float32 against float64."""
    head, data = linear()
    head = jax.tree.map(lambda x: 30 * x, head)
    how = {"alpha": 1.0, "beta": 1.0, "method": method}
    exact = jax.jit(functools.partial(closed_form, **how))(head, data)
    single = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        (head, data),
    )
    value = jax.jit(jax.value_and_grad(functools.partial(closed_form, **how)))
    got, gradient = value(*single)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=CERTIFIED["float32"])
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), single[0])
    two = jax.jit(jax.vmap(functools.partial(closed_form, **how), (0, None)))(stacked, single[1])
    np.testing.assert_allclose(two, jnp.stack([got, got]), rtol=reordered(jnp.float32))


def test_mistakes_say_what_to_do():
    head, data = linear()
    penalty = functools.partial(
        hessian_alignment_penalty, linear_loss, head, data, alpha=1.0, beta=1.0
    )
    with pytest.raises(ValueError, match="method must be one of hgp, hutchinson, got 'hessian'"):
        penalty(method="hessian")
    with pytest.raises(ValueError, match="reference must be one of mean_loss"):
        penalty(reference="none")
    with pytest.raises(ValueError, match=r"takes probes=rademacher\(key, head, K\)"):
        penalty(method="hutchinson")
    with pytest.raises(ValueError, match=r"leaves of shape \(K, \*leaf\)"):
        penalty(method="hutchinson", probes=head)
    with pytest.raises(ValueError, match="method must be one of hgp, diagonal, frobenius"):
        closed_form(head, data, alpha=1.0, beta=1.0, method="hutchinson")
