"""AnyLoss: the published numbers and derivatives, limits, degenerate batches, devices."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from sklearn import metrics
from tolerances import GOLDEN, reordered

from optax_structured.contrib.losses import (
    Confusion,
    confusion_metric,
    confusion_metric_loss,
    soft_confusion,
)
from optax_structured.contrib.losses.confusion import Metric

METRICS = get_args(Metric)
jitted = jax.jit(confusion_metric_loss, static_argnames=("metric", "axis"))
slope = jax.jit(jax.value_and_grad(confusion_metric_loss), static_argnames=("metric", "axis"))
FILES = sorted(path.stem for path in FOLDER.glob("anyloss-*.npz"))


def by_file_name(name):
    """`("f_beta", {"beta": 2.0})` of "f_beta_2.0"."""
    if name.startswith("f_beta"):
        return "f_beta", {"beta": float(name.removeprefix("f_beta_"))}
    return name, {}


def batch(seed=0, n=64, share=0.2, spread=0.5):
    """Logits near the threshold, and a minority of positives."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < share
    logits = spread * rng.standard_normal(n) + np.where(labels, 0.3, -0.3)
    return jnp.asarray(logits, jnp.float32), jnp.asarray(labels)


@pytest.mark.parametrize("name", FILES)
def test_golden(name, x64):
    golden = load(name)
    meta, arrays = golden.meta, golden.arrays
    how = {"steepness": meta["L"], "threshold": meta["threshold"]}
    x, theta, y = (jnp.asarray(arrays[f"inputs/{key}"]) for key in ("X", "theta", "y"))
    p = jax.nn.sigmoid(x @ theta)
    counts = soft_confusion(p, y, **how)
    published = arrays["outputs/tn_fp_fn_tp"]
    ours = [counts.tn, counts.fp, counts.fn, counts.tp]
    np.testing.assert_allclose(ours, published, rtol=GOLDEN)
    for case, loss in golden.leaves("outputs/loss").items():
        metric, extra = by_file_name(case)
        of_theta = jax.value_and_grad(
            lambda t, metric=metric, extra=extra: confusion_metric_loss(
                x @ t, y, metric, **how, **extra
            )
        )
        of_p = jax.grad(
            lambda p, metric=metric, extra=extra: (
                1 - confusion_metric(soft_confusion(p, y, **how), metric, **extra)
            )
        )
        value, gradient = of_theta(theta)
        np.testing.assert_allclose(value, loss, rtol=GOLDEN)
        for got, key in ((gradient, "grad_theta_exact"), (of_p(p), "grad_p_exact")):
            exact = arrays[f"outputs/{key}/{case}"]
            np.testing.assert_allclose(got, exact, rtol=0, atol=GOLDEN * np.abs(exact).max())
        # The slip of the authors: their G-mean has four times the derivative.
        factor = 4 if metric == "g_mean" else 1
        authors = arrays[f"outputs/grad_theta_authors/{case}"] / factor
        np.testing.assert_allclose(gradient, authors, rtol=0, atol=GOLDEN * np.abs(authors).max())


EXACT = {
    "accuracy": metrics.accuracy_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "f_beta": functools.partial(metrics.fbeta_score, beta=2.0),
    "precision": metrics.precision_score,
    "recall": metrics.recall_score,
    "g_mean": lambda y, hard: np.sqrt(
        metrics.recall_score(y, hard) * metrics.recall_score(~y, ~hard)
    ),
}


@pytest.mark.parametrize("metric", METRICS)
def test_steep_limit_is_the_exact_metric(metric):
    logits, labels = batch()
    loss = jitted(logits, labels, metric=metric, beta=2.0, steepness=1e6)
    want = 1 - EXACT[metric](np.asarray(labels), np.asarray(logits) > 0)
    np.testing.assert_allclose(loss, want, atol=reordered(jnp.float32))


@given(st.integers(0, 99), st.sampled_from(METRICS))
def test_order_does_not_matter_and_it_is_between_0_and_1(seed, metric):
    logits, labels = batch(seed)
    order = np.random.default_rng(seed).permutation(len(logits))
    loss = jitted(logits, labels, metric=metric)
    assert 0 <= loss <= 1
    mixed = jitted(logits[order], labels[order], metric=metric)
    np.testing.assert_allclose(loss, mixed, atol=reordered(jnp.float32))


@pytest.mark.parametrize("metric", ["balanced_accuracy", "g_mean", "accuracy"])
def test_classes_may_change_places(metric):
    logits, labels = batch()
    loss = jitted(logits, labels, metric=metric)
    swapped = jitted(-logits, ~labels, metric=metric)
    np.testing.assert_allclose(loss, swapped, atol=reordered(jnp.float32))


def test_undecided_is_half_accurate():
    _, labels = batch()
    np.testing.assert_allclose(
        confusion_metric_loss(jnp.zeros(labels.shape), labels, "accuracy"), 0.5, rtol=1e-6
    )


def test_f1_is_the_dice_loss_of_the_soft_labels():
    logits, labels = batch()
    q = jax.nn.sigmoid(73.0 * (jax.nn.sigmoid(logits) - 0.5))
    as_logits, targets = jnp.log(q / (1 - q))[:, None], labels.astype(jnp.float32)[:, None]
    dice = optax.losses.dice_loss(as_logits, targets, smooth=0.0, axis=0)
    np.testing.assert_allclose(confusion_metric_loss(logits, labels), dice, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (jnp.linspace(-3.0, 3.0, 8), jnp.ones(8)),
        (jnp.linspace(-3.0, 3.0, 8), jnp.zeros(8)),
        (jnp.full(8, -50.0), jnp.arange(8) % 2),  # TP = 0 exactly: the root of the G-mean
        (jnp.full(8, 50.0), jnp.arange(8) % 2),
        (jnp.zeros(0), jnp.zeros(0)),
    ],
    ids=["all positive", "no positive", "none predicted", "all predicted", "empty"],
)
def test_degenerate_batches_are_finite(metric, logits, labels):
    loss, gradient = slope(logits, labels, metric=metric)
    assert jnp.isfinite(loss)
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_weights_leave_out_and_repeat(metric):
    logits, labels = batch()
    kept = jnp.arange(len(logits)) % 3 > 0
    want, expected = slope(logits[kept], labels[kept], metric=metric)
    spoiled = jnp.where(kept, logits, jnp.nan)
    got, gradient = slope(spoiled, labels, metric=metric, weights=kept)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(gradient[kept], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[~kept], 0.0)
    twice = jitted(jnp.tile(logits, 2), jnp.tile(labels, 2), metric=metric)
    doubled = jitted(logits, labels, metric=metric, weights=2.0)
    np.testing.assert_allclose(doubled, twice, atol=1e-6)


def test_classes_are_averaged_and_vmapped():
    logits = jax.random.normal(jax.random.key(0), (32, 4))
    labels = jax.nn.one_hot(jnp.arange(32) % 4, 4)
    macro = confusion_metric_loss(logits, labels, "f_beta", axis=0)
    alone = jax.vmap(confusion_metric_loss, in_axes=1)(logits, labels)
    np.testing.assert_allclose(macro, alone.mean(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_eight_devices_see_one_batch(metric):
    """Counts are summed before the ratio; a mean of the ratios is another number."""
    logits, labels = batch(n=8 * 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data")))
    def sharded(z, y):
        return jax.value_and_grad(confusion_metric_loss)(z, y, metric, axis_name="data")

    got, gradient = sharded(logits, labels)
    want, expected = slope(logits, labels, metric=metric)
    np.testing.assert_allclose(got, want, atol=reordered(jnp.float32))
    np.testing.assert_allclose(gradient, expected, atol=reordered(jnp.float32))
    if metric == "f_beta":
        parts = jax.vmap(confusion_metric_loss)(logits.reshape(8, 8), labels.reshape(8, 8))
        assert abs(parts.mean() - want) > 0.01


def test_accumulation_of_counts_gives_the_gradient_of_the_batch():
    logits, labels = batch()
    count = lambda z, y: soft_confusion(jax.nn.sigmoid(z), y)  # noqa: E731
    add = functools.partial(jax.tree.map, jnp.add)
    parts = list(zip(jnp.split(logits, 4), jnp.split(labels, 4), strict=True))
    whole = functools.reduce(add, [count(z, y) for z, y in parts])

    def part(z, y):
        own = count(z, y)
        rest = jax.tree.map(lambda a, b: jax.lax.stop_gradient(a - b), whole, own)
        return 1 - confusion_metric(add(own, rest))

    gradient = jnp.concatenate([jax.grad(part)(z, y) for z, y in parts])
    want = jax.grad(confusion_metric_loss)(logits, labels)
    np.testing.assert_allclose(gradient, want, atol=reordered(jnp.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_counted_in_float32(dtype):
    logits, labels = batch(n=4096)
    loss = confusion_metric_loss(logits.astype(dtype), labels)
    assert loss.dtype == jnp.float32
    exact = confusion_metric_loss(logits.astype(dtype).astype(jnp.float32), labels)
    np.testing.assert_array_equal(loss, exact)


def test_jit_and_traced_settings():
    logits, labels = batch()
    steep = jax.jit(lambda s: confusion_metric_loss(logits, labels, steepness=s, beta=s / 10))
    want = confusion_metric_loss(logits, labels, steepness=20.0, beta=2.0)
    np.testing.assert_allclose(steep(20.0), want, rtol=1e-6)


def test_mistakes_say_what_to_do():
    logits, labels = batch()
    with pytest.raises(ValueError, match=r"shape \(64, 1\) but labels of shape \(64,\)"):
        confusion_metric_loss(logits[:, None], labels)
    with pytest.raises(ValueError, match="must be one of accuracy, .*, got 'f1'"):
        confusion_metric_loss(logits, labels, "f1")
    with pytest.raises(ValueError, match="steepness must be"):
        soft_confusion(logits, labels, steepness=0.0)
    assert Confusion._fields == ("tp", "fp", "fn", "tn")
