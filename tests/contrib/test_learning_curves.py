"""Exact learning curves, and the optimizers that have to follow them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from tolerances import GOLDEN, LEARNING_CURVE, reordered

import optax_structured as oxs
from optax_structured.contrib import learning_curves as curves

FILES = sorted(path.stem for path in FOLDER.glob("generalization_dynamics-*.npz"))
ALPHAS = (0.5, 1.0, 2.0)


@pytest.mark.parametrize("name", FILES)
def test_golden(name):
    golden = load(name)
    inputs, outputs = golden.leaves("inputs"), golden.leaves("outputs")
    inr = golden.meta["inr"] or np.inf
    flow = curves.gradient_flow(inputs["time"])
    for (i, alpha), (j, snr) in (
        (a, s) for a in enumerate(inputs["alpha"]) for s in enumerate(inputs["snr"])
    ):
        how = {"alpha": alpha, "snr": snr, "inr": inr}
        got = curves.generalization_error(flow, **how), curves.training_error(flow, **how)
        for values, key in zip(got, ("generalization_error", "training_error"), strict=True):
            np.testing.assert_allclose(values, outputs[key][i, j], rtol=GOLDEN)
        ridge = curves.optimal_ridge_error(alpha, snr=snr)
        np.testing.assert_allclose(ridge, outputs["optimal_ridge_error"][i, j], rtol=GOLDEN)


@pytest.mark.parametrize("alpha", [0.1, *ALPHAS, 30.0])
def test_spectrum(alpha):
    """Mass 1, and the moments alpha and alpha + alpha^2 of XX' / N."""
    eigenvalues, weights = curves.marchenko_pastur(alpha)
    moments = [weights @ eigenvalues**k for k in range(3)]
    np.testing.assert_allclose(moments, [1, alpha, alpha + alpha**2], rtol=GOLDEN)
    assert weights[-1] == max(0.0, 1 - alpha)
    assert eigenvalues[:-1].min() >= (np.sqrt(alpha) - 1) ** 2


def test_limits():
    start_and_end = curves.gradient_flow([0.0, 1e12])
    error = functools.partial(curves.generalization_error, start_and_end, snr=4.0)
    for alpha in (1.5, 3.0):
        end = 0.25 * (1 + 1 / (alpha - 1))
        np.testing.assert_allclose(error(alpha=alpha, inr=2.0), [1.75, end], rtol=GOLDEN)
        left = curves.training_error(start_and_end, alpha, snr=4.0)[1]
        np.testing.assert_allclose(left, 0.25 * (1 - 1 / alpha), rtol=GOLDEN)
    # The null space keeps what it started with, for good.
    frozen = error(alpha=0.5, inr=2.0)[1] - error(alpha=0.5)[1]
    np.testing.assert_allclose(frozen, 0.5 * 0.5, rtol=GOLDEN)


def test_double_descent_and_optimal_stopping():
    times = np.geomspace(0.01, 1e4, 200)
    by_alpha = {
        alpha: curves.generalization_error(curves.gradient_flow(times), alpha, snr=5.0)
        for alpha in (0.5, 0.9, 1.0, 1.1, 2.0)
    }
    late = {alpha: error[-1] for alpha, error in by_alpha.items()}
    assert late[0.5] < late[0.9] < late[1.0] > late[1.1] > late[2.0]
    for alpha, error in by_alpha.items():
        ridge = curves.optimal_ridge_error(alpha, snr=5.0)
        assert ridge <= error.min() < 1.05 * ridge


def momentum(learning_rate, decay, steps):
    """In closed form, from the roots of r^2 - (1 + b - h lambda) r + b."""

    def residual(eigenvalues):
        middle = (1 + decay - learning_rate * eigenvalues) / 2
        root = np.emath.sqrt(middle**2 - decay)
        first, second = middle + root, middle - root
        # The two that give 1 after no step and 1 - h lambda after one.
        share = (1 - learning_rate * eigenvalues - second) / (first - second)
        k = np.arange(steps + 1)[:, None]
        return np.real(share * first**k + (1 - share) * second**k)

    return residual


def dual_averaging(learning_rate, keep, steps):
    """The published recursion, for the gradient lambda w."""

    def residual(eigenvalues):
        left, total, path = np.ones_like(eigenvalues), 0.0, [np.ones_like(eigenvalues)]
        for t in range(1, steps + 1):
            total = total + np.sqrt(t) * eigenvalues * left
            left = keep * left + (1 - keep) * (1 - learning_rate * total / np.sqrt(t))
            path.append(left)
        return np.stack(path)

    return residual


STEPS = 25
# Name: optimizer, its residual in closed form. Stable for the largest eigenvalue below, 5.8.
OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), curves.gradient_descent(0.1, np.arange(STEPS + 1))),
    "momentum": (optax.sgd(0.05, momentum=0.8), momentum(0.05, 0.8, STEPS)),
    "dual_averaging": (oxs.rmda(0.05, momentum=0.0), dual_averaging(0.05, 0.0, STEPS)),
    "dual_averaging_kept": (oxs.rmda(0.2, momentum=0.7), dual_averaging(0.2, 0.7, STEPS)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_optimizer
def test_residuals_of_optimizers(name, x64):
    """Each optimizer, run on single modes, is its closed form."""
    optimizer, residual = OPTIMIZERS[name]
    eigenvalues, _ = curves.marchenko_pastur(2.0, points=50)
    measured = curves.linear_optimizer(optimizer, STEPS)(eigenvalues)
    np.testing.assert_allclose(measured, residual(eigenvalues), atol=reordered(jnp.float64))


def descend(optimizer, x, y, start, average=None):
    """All iterates of full-batch descent on the sum of squares, or their moving average."""
    gradient = jax.grad(lambda w: 0.5 * jnp.sum(jnp.square(y - w @ x)))

    def step(carry, _):
        w, mean, state = carry
        updates, state = optimizer.update(gradient(w), state, w)
        w = optax.apply_updates(w, updates)
        mean = w if average is None else optax.incremental_update(w, mean, average)
        return (w, mean, state), mean

    path = jax.lax.scan(step, (start, start, optimizer.init(start)), length=STEPS)[1]
    return jnp.concatenate([start[None], path])


def normal(rng, size):
    """Normal numbers whose mean square is 1, not only in expectation."""
    vector = rng.standard_normal(size)
    return vector / np.sqrt(np.mean(vector**2))


def draw(seed, alpha, size, snr=4.0, inr=2.0):
    rng = np.random.default_rng(seed)
    teacher, start = normal(rng, size), normal(rng, size) / np.sqrt(inr)
    x = rng.standard_normal((size, int(alpha * size))) / np.sqrt(size)
    return x, teacher @ x + normal(rng, x.shape[1]) / np.sqrt(snr), start, teacher


@every_optimizer
def test_one_realisation_mode_by_mode(name, x64):
    """z(t) = p z(0) + (1 - p) V'Xy / lambda, to rounding, on data of rank 12 in 12 dimensions."""
    optimizer, residual = OPTIMIZERS[name]
    x, y, start, _ = draw(0, 2.0, 12)
    eigenvalues, modes = np.linalg.eigh(x @ x.T)
    left = residual(eigenvalues)
    want = left * (modes.T @ start) + (1 - left) * (modes.T @ x @ y) / eigenvalues
    got = jax.jit(functools.partial(descend, optimizer))(x, y, start) @ modes
    np.testing.assert_allclose(got, want, atol=1e3 * reordered(jnp.float64))


@functools.cache
def draws(alpha):
    many = zip(*(draw(seed, alpha, 256) for seed in range(32)), strict=True)
    return [np.stack(part).astype("float32") for part in many]


def averaged(residual, rate):
    """The residual of a moving average of the weights."""

    def of_mean(eigenvalues):
        path = residual(eigenvalues)
        mean, out = path[0], [path[0]]
        for left in path[1:]:
            mean = (1 - rate) * mean + rate * left
            out.append(mean)
        return np.stack(out)

    return of_mean


@pytest.mark.slow
@pytest.mark.parametrize("average", [None, 0.2], ids=["weights", "averaged"])
@every_optimizer
def test_expected_error_of_real_training(name, average):
    """256 weights, 32 draws, one run each: mean errors against the integral over the spectrum."""
    optimizer, residual = OPTIMIZERS[name]
    residual = residual if average is None else averaged(residual, average)
    run = jax.jit(jax.vmap(functools.partial(descend, optimizer, average=average)))
    for alpha in (0.5, 2.0):
        x, y, start, teacher = draws(alpha)
        w = np.asarray(run(x, y, start))
        new = np.mean((w - teacher[:, None]) ** 2, (0, 2)) + 0.25
        seen = np.mean((np.einsum("stn,snp->stp", w, x) - y[:, None]) ** 2, (0, 2))
        how = {"alpha": alpha, "snr": 4.0, "inr": 2.0}
        np.testing.assert_allclose(
            new, curves.generalization_error(residual, **how), rtol=LEARNING_CURVE
        )
        np.testing.assert_allclose(
            seen, curves.training_error(residual, **how), rtol=LEARNING_CURVE
        )


def test_another_learning_rate_is_noticed():
    """The test above can fail: a rate that is 20 % off leaves the band."""
    how = {"alpha": 2.0, "snr": 4.0, "inr": 2.0}
    right, wrong = (
        curves.training_error(curves.gradient_descent(rate, np.arange(STEPS)), **how)
        for rate in (0.1, 0.12)
    )
    assert np.max(np.abs(wrong / right - 1)) > 2 * LEARNING_CURVE


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="alpha must be above 0, examples per weight, got -1"):
        curves.marchenko_pastur(-1.0)
