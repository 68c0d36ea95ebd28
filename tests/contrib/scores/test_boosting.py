"""Boosting of a hidden layer: the published losses, and what the sum of small networks is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from tolerances import GOLDEN, rounding

from optax_structured.contrib.scores import boosting_loss, fit_boosted_network

FILES = sorted(path.stem for path in FOLDER.glob("gbnn-*.npz"))
KINDS = {"squared": "squared", "logexp": "logistic", "multiclass": "softmax"}
EVERY = ("squared", "logistic", "softmax")


@pytest.mark.parametrize("name", FILES)
def test_golden(name, x64):
    golden = load(name)
    cases = {key.split("/")[0] for key in golden.arrays}
    assert cases <= KINDS.keys()
    for case in cases:
        want = golden.leaves(case)
        loss = boosting_loss(KINDS[case])
        y, f, h = (jnp.asarray(want[key]) for key in ("y", "F", "h"))
        value = loss.value(y, f) if np.ndim(want["loss"]) else jnp.sum(loss.value(y, f))
        got = {
            "init": jnp.atleast_1d(loss.start(y)),
            "residual": loss.residual(y, f),
            "rho": loss.step(y, f, h),
            "loss": value,
        }
        for key, ours in got.items():
            np.testing.assert_allclose(ours, want[key], rtol=GOLDEN, atol=GOLDEN, err_msg=key)


def targets(kind, n=30):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 3))
    label = (x[:, 0] * x[:, 1] > 0).astype(int) + (x[:, 2] > 1)
    y = {"squared": x[:, 0] ** 2, "logistic": 2.0 * (label > 0) - 1, "softmax": np.eye(3)[label]}
    return jnp.asarray(x), jnp.asarray(y[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_pieces_are_derivatives_of_the_loss(kind, x64):
    loss, (_, y) = boosting_loss(kind), targets(kind)
    f, h = jnp.asarray(np.random.default_rng(1).standard_normal((2, *y.shape)))
    total = lambda f: jnp.sum(loss.value(y, f))  # noqa: E731
    slope = -jax.grad(total)(f)
    if kind == "squared":
        slope = slope / 2  # the published loss has no half
    np.testing.assert_allclose(loss.residual(y, f), slope, rtol=1e-12, atol=1e-12)
    if kind == "logistic":  # exactly Newton; softmax takes the diagonal of the Hessian
        along = lambda rate: total(f + rate * h)  # noqa: E731
        newton = -jax.grad(along)(0.0) / jax.grad(jax.grad(along))(0.0)
        np.testing.assert_allclose(loss.step(y, f, h), newton, rtol=1e-12)
    if kind != "softmax":
        constant = jax.grad(lambda c: total(jnp.full_like(f, c)))(loss.start(y))
        np.testing.assert_allclose(constant, 0.0, atol=1e-12)


@pytest.mark.parametrize("kind", EVERY)
def test_saturated_scores_are_finite(kind):
    """Right and wrong by a thousand, one class only, and a learner that says nothing."""
    loss, (_, y) = boosting_loss(kind), targets(kind)
    y = y.astype(jnp.float32)
    for f in (1e3 * y, -1e3 * y):
        for h in (jnp.ones_like(y), jnp.zeros_like(y), f):
            pieces = loss.residual(y, f), loss.step(y, f, h), loss.value(y, f), loss.link(f)
            assert all(jnp.all(jnp.isfinite(piece)) for piece in pieces)
    assert loss.step(y, f, jnp.zeros_like(y)) == (1.0 if kind == "squared" else 0.0)
    assert jnp.all(jnp.isfinite(loss.start(jnp.ones_like(y))))


FIT = {"rounds": 3, "units": 2, "steps": 200, "subsample": 1.0, "optimizer": optax.adam(0.05)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_the_sum_is_one_network(kind, x64):
    x, y = targets(kind)
    fit = functools.partial(fit_boosted_network, x=x, y=y, loss=kind, **FIT)
    network = jax.jit(fit)(jax.random.key(0))
    scores = network.scores(x)
    for rounds in (1, 3):
        dense = network.dense(rounds)
        assert dense["hidden"]["kernel"].shape == (3, 2 * rounds)
        hidden = jax.nn.sigmoid(x @ dense["hidden"]["kernel"] + dense["hidden"]["bias"])
        ours = hidden @ dense["output"]["kernel"] + dense["output"]["bias"]
        np.testing.assert_allclose(ours, scores[rounds - 1], atol=1e-12)
    loss = boosting_loss(kind)
    of_targets = y.reshape(len(y), -1)
    by_round = [jnp.mean(loss.value(of_targets, f)) for f in scores]
    np.testing.assert_allclose(network.loss, by_round, rtol=1e-12)
    assert network.loss[-1] < jnp.mean(
        loss.value(of_targets, loss.start(of_targets) + 0 * scores[0])
    )
    if kind == "logistic":
        logits = network.dense(scale=2.0)["output"]["bias"]
        np.testing.assert_allclose(logits, 2 * network.dense()["output"]["bias"])


def test_exact_fits_never_raise_the_squared_error(x64):
    """Random hidden units, output weights by least squares, full step."""
    x, y = targets("squared")
    loss, rng = boosting_loss("squared"), np.random.default_rng(2)
    f = jnp.broadcast_to(loss.start(y), y.shape)
    errors = [jnp.mean(loss.value(y, f))]
    for _ in range(6):
        hidden = np.c_[np.tanh(x @ rng.standard_normal((3, 2))), np.ones(len(x))]
        r = loss.residual(y, f)
        h = jnp.asarray(hidden @ np.linalg.lstsq(hidden, r, rcond=None)[0])
        f = f + loss.step(y, f, h) * h
        errors.append(jnp.mean(loss.value(y, f)))
    assert np.all(np.diff(errors) <= 1e-12)
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.slow
def test_one_round_on_all_rows_is_an_ordinary_fit(x64):
    """The constant aside: another optimizer on the same objective ends where the round ends."""
    x, y = targets("squared")
    network = fit_boosted_network(
        jax.random.key(0), x, y, rounds=1, units=3, subsample=1.0, steps=40, l2=0.1
    )

    def objective(p):
        hidden = jax.nn.sigmoid(x @ p["kernel"] + p["bias"])
        error = hidden @ p["output"] + p["offset"] + y.mean() - y
        return 0.5 * jnp.mean(error**2) + 0.05 / len(x) * sum(
            jnp.sum(p[k] ** 2) for k in ("kernel", "output")
        )

    p = {"kernel": network.kernel[0], "bias": network.bias[0]}
    p |= {"output": network.output[0, :, 0], "offset": network.offset[0, 0]}
    gradient = jax.grad(objective)(p)
    assert optax.tree.norm(gradient) < 0.05 * optax.tree.norm(
        jax.grad(objective)(jax.tree.map(jnp.ones_like, p))
    )


def test_any_optimizer_and_float32():
    x, y = (z.astype(jnp.float32) for z in targets("logistic"))
    fit = functools.partial(fit_boosted_network, x=x, y=y, loss="logistic", rounds=4, units=2)
    network = jax.jit(functools.partial(fit, optimizer=optax.adam(0.05)))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype("float32")}
    assert network.loss[-1] < network.loss[0]


@pytest.mark.slow
def test_keys_are_all_the_randomness():
    x, y = targets("squared")
    fit = jax.jit(
        lambda key: fit_boosted_network(key, x, y, rounds=2, steps=5, optimizer=optax.adam(0.05))
    )
    first, again, other = (fit(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.kernel, again.kernel)
    assert not np.array_equal(first.kernel, other.kernel)
    together = jax.vmap(fit)(jnp.stack([jax.random.key(0), jax.random.key(1)]))
    np.testing.assert_allclose(together.start[0], first.start, rtol=rounding(jnp.float32))


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="kind must be one of squared, logistic, softmax"):
        boosting_loss("hinge")
