"""Spectra and stability: recorded files, closed forms, and simulated SGD."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import load, names
from hlo import all_collectives, shapes_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import EIGENVALUES, GOLDEN, assert_close

from optax_structured.curvature import (
    Density,
    ggn_vp,
    hessian_density,
    hutchinson,
    hvp,
    lanczos,
    layer_masks,
    max_stable_learning_rate,
    per_example,
    quadrature,
    second_moment_radius,
    smooth,
    softmax_root,
    spectral_density,
    stability_report,
    summarize,
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("hessian_spectrum-"))
def test_golden_spectrum(name):
    golden = load(name)
    matrix, probes = (jnp.asarray(golden.arrays[f"inputs/{k}"]) for k in ("matrix", "probes"))
    out = golden.leaves("outputs")

    def one(probe):
        alpha, beta = lanczos(lambda v: matrix @ v, probe, golden.meta["order"])
        return alpha, beta, *quadrature(alpha, beta)

    alpha, beta, nodes, weights = jax.jit(jax.vmap(one))(probes)
    for key, found in {"alpha": alpha, "beta": beta, "nodes": nodes, "weights": weights}.items():
        assert_close(found, out[key], GOLDEN)
    density = Density(nodes, weights, jnp.asarray(float(len(matrix))))
    values, grid = smooth(density, jnp.asarray(out["grid"]), golden.meta["sigma_squared"])
    assert_close(values, out["density"], GOLDEN)
    low, high = smooth(density, sigma_squared=golden.meta["sigma_squared"], points=2)[1]
    np.testing.assert_allclose([low, high], [grid[0], grid[-1]], rtol=GOLDEN)
    square = jnp.sum(probes**2, -1)
    for key, f in {"trace": lambda x: x, "trace_square": jnp.square, "exp": jnp.exp}.items():
        np.testing.assert_allclose(
            square * jnp.sum(weights * f(nodes), -1), out[f"quadform/{key}"], rtol=GOLDEN
        )


def symmetric(d, seed=0):
    A = np.random.default_rng(seed).standard_normal((d, d))
    return jnp.asarray(A + A.T)


@pytest.mark.slow
def test_exact_at_full_order_and_for_low_degrees(x64):
    A = symmetric(6)
    density = jax.jit(
        lambda: spectral_density(
            lambda v: A @ v, jnp.zeros(6), jax.random.key(0), order=6, probes=1
        )
    )()
    np.testing.assert_allclose(density.nodes[0], np.linalg.eigvalsh(A), rtol=1e-9)
    v = jnp.arange(1.0, 7.0)
    nodes, weights = quadrature(*lanczos(lambda v: A @ v, v, 3))
    for power in range(6):
        expected = v @ np.linalg.matrix_power(A, power) @ v
        np.testing.assert_allclose(v @ v * weights @ nodes**power, expected, rtol=1e-9)
    shifted, _ = quadrature(*lanczos(lambda v: 3 * (A @ v) + 2 * v, v, 3))
    np.testing.assert_allclose(shifted, 3 * nodes + 2, rtol=1e-9)


@pytest.mark.slow
def test_exhausted_spaces_have_no_weight():
    """Two eigenvalues, and an order of 6: in float32, where the rest is rounding."""
    scales = jnp.array([2.0, 2.0, 5.0, 5.0, 5.0])
    alpha, beta = lanczos(lambda v: scales * v, jnp.ones(5), 6)
    nodes, weights = quadrature(alpha, beta)
    np.testing.assert_array_equal(beta[1:], 0)
    seen = nodes[weights > 1e-6]
    np.testing.assert_allclose(seen, [2, 5], rtol=1e-5)
    summary = summarize(Density(nodes[None], weights[None], jnp.asarray(5.0)))
    assert summary.negative_mass == 0
    np.testing.assert_allclose([summary.smallest, summary.largest], [2, 5], rtol=1e-5)


def test_the_order_does_not_change_the_program():
    traced = [jax.make_jaxpr(lambda v, k=k: lanczos(lambda x: 2 * x, v, k)) for k in (4, 64)]
    assert len({str(f(jnp.ones(5))).count("\n") for f in traced}) == 1


def test_agrees_with_matfree(x64):
    decomp = pytest.importorskip("matfree.decomp")
    A, v = symmetric(12), jnp.arange(1.0, 13.0)
    theirs = decomp.tridiag_sym(5, materialize=False)(lambda v: A @ v, v).J_small
    for found, expected in zip(lanczos(lambda v: A @ v, v, 5), theirs, strict=True):
        np.testing.assert_allclose(jnp.abs(found), jnp.abs(expected), rtol=1e-10)


def curved(w, batch):
    return jnp.mean(jnp.square(jnp.tanh(batch @ w["a"]) @ w["b"]))


def small():
    keys = jax.random.split(jax.random.key(1), 3)
    w = {
        "a": jax.random.normal(keys[0], (3, 2), float),
        "b": jax.random.normal(keys[1], (2,), float),
    }
    return w, jax.random.normal(keys[2], (8, 3), float)


@pytest.mark.slow
def test_hessians_whole_per_layer_and_preconditioned(x64):
    w, batch = small()
    flat, unravel = jax.flatten_util.ravel_pytree(w)
    H = jax.hessian(lambda f: curved(unravel(f), batch))(flat)
    product = hvp(curved, w, batch)
    columns = [jax.flatten_util.ravel_pytree(product(unravel(e)))[0] for e in np.eye(8)]
    np.testing.assert_allclose(jnp.stack(columns), H, atol=1e-12)

    @jax.jit
    def density(mask, metric):
        return hessian_density(
            curved, w, batch, jax.random.key(0), order=8, probes=1, mask=mask, preconditioner=metric
        )

    ones = jax.tree.map(jnp.ones_like, w)
    for path, mask in layer_masks(w).items():
        part = slice(0, 6) if path == "a" else slice(6, 8)
        found = density(mask, ones)
        expected = np.linalg.eigvalsh(H[part, part])
        summary = summarize(found)
        assert found.size == len(expected)
        np.testing.assert_allclose(summary.largest, expected[-1], rtol=1e-6)
    metric = unravel(jnp.arange(1.0, 9.0))
    root = np.diag(np.arange(1.0, 9.0) ** -0.5)
    whole = density(jax.tree.map(lambda x: jnp.asarray(True), w), metric)
    np.testing.assert_allclose(
        whole.nodes[0], np.linalg.eigvalsh(root @ H @ root), rtol=1e-6, atol=1e-9
    )
    assert summarize(whole).negative_mass > 0


@pytest.mark.slow
def test_sharded_parameters_stay_sharded():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(jnp.arange(1.0, 17.0), NamedSharding(mesh, P("d")))
    loss = lambda w, batch: jnp.sum(batch * w**2)  # noqa: E731
    density = jax.jit(lambda w: hessian_density(loss, w, 2.0, jax.random.key(0), order=2, probes=1))
    with jax.set_mesh(mesh):
        compiled = density.lower(w).compile()
        found = compiled(w)
    gathered = [x for x in all_collectives(compiled.as_text()) if "all-gather" in x]
    assert max((math.prod(s) for x in gathered for s in shapes_of(x)), default=0) < w.size
    np.testing.assert_allclose(summarize(found).largest, 4.0, rtol=1e-5)


@pytest.mark.slow
def test_gauss_newton_products_and_single_gradients(x64):
    w, X = small()
    outputs = lambda w, X: jnp.tanh(X @ w["a"])  # noqa: E731
    loss = lambda z: jnp.sum(jnp.cosh(z))  # noqa: E731
    J = jax.jacobian(lambda a: outputs({"a": a}, X).ravel())(w["a"]).reshape(16, 6)
    H = jax.hessian(lambda z: loss(z.reshape(8, 2)))(outputs(w, X).ravel())
    product = ggn_vp(outputs, loss, {"a": w["a"]}, X)
    v = jnp.arange(6.0).reshape(3, 2)
    assert_close(product({"a": v})["a"].ravel(), J.T @ H @ J @ v.ravel(), 1e-12)
    whole, chunked = per_example(curved, w, X), per_example(curved, w, X, chunk=3)
    mean = jax.grad(curved)(w, X)
    for leaf in w:
        assert_close(whole[leaf].mean(0), mean[leaf], 1e-12)
        assert_close(chunked[leaf], whole[leaf], 1e-12)


def linear_report(jac, **settings):
    return stability_report(lambda w, J: J @ w, jnp.zeros(jac.shape[1], jac.dtype), jac, **settings)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("dynamical_stability-"))
def test_golden_stability(name):
    golden = load(name)
    meta = golden.meta
    jac, residual = (jnp.asarray(golden.arrays[key]) for key in ("jac", "residual"))
    report = linear_report(
        jac, learning_rate=meta["eta"], batch_size=meta["batch"], residuals=residual
    )
    found = (report.trace, report.fro, report.lambda_max, report.alignment)
    expected = [meta[key] for key in ("trace", "fro", "lmax", "alignment")]
    np.testing.assert_allclose(found, expected, rtol=GOLDEN)
    radius = second_moment_radius(jac, meta["eta"], meta["batch"])
    np.testing.assert_allclose(radius, meta["second_moment_radius"], rtol=GOLDEN)
    if radius < 1:
        assert report.ratio <= 1


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_limit_is_necessary_and_sharper_than_the_trace(batch_size, x64):
    rng = np.random.default_rng(0)
    jac = jnp.asarray(rng.standard_normal((12, 4)) * rng.uniform(0.2, 3, (12, 1)))
    report = linear_report(jac, learning_rate=0.1, batch_size=batch_size)
    rates = np.geomspace(1e-3, 3, 200)
    radius = np.array([second_moment_radius(jac, r, batch_size) for r in rates[::20]])
    stable = rates[::20][radius < 1].max()
    assert stable <= report.limit
    if batch_size == 1:
        assert report.limit < max_stable_learning_rate(report, "trace")
    fro = max_stable_learning_rate(report._replace(alignment=jnp.asarray(1.0)), "fro")
    np.testing.assert_allclose(fro, np.sqrt(batch_size) / report.fro)


@pytest.mark.slow
def test_simulated_sgd_grows_above_the_radius_and_shrinks_below(x64):
    jac = jnp.asarray(np.random.default_rng(1).standard_normal((6, 3)))
    keys = jax.random.split(jax.random.key(0), 4000)

    @jax.jit
    @jax.vmap
    def run(key, rate):
        def step(w, key):
            rows = jac[jax.random.randint(key, (2,), 0, 6)]
            return w - rate * rows.T @ (rows @ w) / 2, None

        w, _ = jax.lax.scan(step, jnp.ones(3, float), jax.random.split(key, 30))
        return jnp.sum((jac @ w) ** 2)

    start = jnp.sum((jac @ jnp.ones(3)) ** 2)
    for rate, grows in ((1.35, False), (2.0, True)):
        assert bool(second_moment_radius(jac, rate, 2) > 1) is grows
        assert bool(run(keys, jnp.full(4000, rate)).mean() > start) is grows


def test_all_signs_give_trace_and_norm_exactly(x64):
    A = symmetric(5)
    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=5)))
    images = signs @ A
    np.testing.assert_allclose(jnp.mean(jnp.sum(signs * images, 1)), jnp.trace(A), rtol=1e-9)
    np.testing.assert_allclose(jnp.mean(jnp.sum(images**2, 1)), jnp.sum(A**2), rtol=1e-9)
    A = A @ A
    found = hutchinson(lambda v: A @ v, jnp.zeros(5), jax.random.key(0), 2000)
    np.testing.assert_allclose(found, [jnp.trace(A), jnp.linalg.norm(A)], rtol=EIGENVALUES)


@pytest.mark.slow
def test_cross_entropy_folds_its_root_into_the_outputs(x64):
    X = jnp.asarray(np.random.default_rng(2).standard_normal((5, 2)))
    w = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3)))
    model = lambda w, X: X @ w  # noqa: E731
    report = stability_report(
        model, w, X, learning_rate=0.1, batch_size=5, hessian_root=softmax_root(model(w, X))
    )
    z = jax.nn.logsumexp
    H = jax.hessian(lambda f: jnp.mean(z(X @ f.reshape(2, 3), axis=-1)))(w.ravel())
    np.testing.assert_allclose(report.trace, jnp.trace(H), rtol=1e-9)
    np.testing.assert_allclose(report.fro, jnp.linalg.norm(H), rtol=1e-9)
    np.testing.assert_allclose(report.lambda_max, jnp.linalg.eigvalsh(H)[-1], rtol=1e-9)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: stability_report(
                lambda w, X: jnp.sum(X @ w),
                jnp.ones(2),
                jnp.ones((3, 2)),
                learning_rate=1.0,
                batch_size=1,
            ),
            r"outputs must be \(n,\) or \(n, outputs\) for n = 3",
        ),
        (
            lambda: spectral_density(lambda v: v, jnp.ones(2), jax.random.key(0), order=0),
            "order and probes must be at least 1",
        ),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
