"""The loop: exact continuation, order of the data, what is written, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_structured import diagnostics as dx
from optax_structured.training.images import config, data, loop
from optax_structured.training.images.experiment import Experiment


@functools.cache
def experiment(recipe="ramda", model="mlp", **given):
    images = data.load("digits")
    small = {"epochs": 6, "stages": 3, "batch_size": 128, **given}
    chosen = config.make({"recipe": recipe, "model": model, **small}, len(images.train))
    return Experiment(chosen, images)


def assert_same_bits(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def numbers(rows):
    return [{name: x for name, x in row.items() if name != "steps_per_second"} for row in rows]


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ("ramda", "logistic"),
        ("adamw", "logistic"),
        pytest.param("ramda", "conv", marks=pytest.mark.slow),
    ],
)
def test_resuming_continues_bit_for_bit(recipe, model, tmp_path, monkeypatch):
    """Across a milestone, saving every epoch, with a new experiment as in a new process."""
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_SAVES", 0.0)
    whole = loop.train(experiment(recipe, model), tmp_path / "whole")
    loop.train(experiment(recipe, model), tmp_path / "parts", stop_after=3)
    fresh = Experiment(config.load(tmp_path / "parts"), data.load("digits"))
    parts = loop.train(fresh, tmp_path / "parts", resume=True)
    assert_same_bits(parts.state, whole.state)
    assert numbers(parts.rows) == numbers(whole.rows)
    assert_same_bits(parts.strips, whole.strips)


@pytest.mark.parametrize(
    "recipe, bits",
    [
        ("prox_sgd", 8),
        pytest.param("adamw", 8, marks=pytest.mark.slow),
        pytest.param("prox_adam", 4, marks=pytest.mark.slow),
        pytest.param("prox_ssi", 8, marks=pytest.mark.slow),
    ],
)
def test_resuming_continues_codes_bit_for_bit(recipe, bits, tmp_path):
    options = {"state_bits": bits, "epochs": 2, "stages": 1}
    whole = loop.train(experiment(recipe, **options), tmp_path / "whole")
    loop.train(experiment(recipe, **options), tmp_path / "parts", stop_after=1)
    parts = loop.train(experiment(recipe, **options), tmp_path / "parts", resume=True)
    assert_same_bits(parts.state, whole.state)
    assert any(x.dtype == "uint8" for x in jax.tree.leaves(whole.state.opt_state))


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    whole = loop.train(experiment(model="logistic"), tmp_path, stop_after=2)
    metrics = tmp_path / loop.METRICS
    text = metrics.read_text()
    metrics.write_text(text + text.splitlines()[-1] + "\n")
    again = loop.train(experiment(model="logistic"), tmp_path, resume=True, stop_after=3)
    assert numbers(again.rows)[:2] == numbers(whole.rows)
    assert [row["epoch"] for row in again.rows] == [1, 2, 3]


def test_a_run_that_was_stopped_at_once_can_be_continued(tmp_path):
    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(experiment(model="logistic"), tmp_path, watch=interrupt)
    again = loop.train(experiment(model="logistic"), tmp_path, resume=True, stop_after=1)
    assert [row["epoch"] for row in again.rows] == [1]
    with pytest.raises(ValueError, match="stop_after must be at least 1 epoch, got 0"):
        loop.train(experiment(model="logistic"), tmp_path, resume=True, stop_after=0)


def test_a_finished_run_can_be_read_again(tmp_path):
    first = loop.train(experiment(model="logistic"), tmp_path)
    again = loop.train(experiment(model="logistic"), tmp_path, resume=True)
    assert numbers(again.rows) == numbers(first.rows)
    assert_same_bits(again.state, first.state)


def test_the_order_depends_on_seed_and_epoch_alone():
    one = experiment()
    order = one.order(4)
    assert order.shape == (1442 // 128, 128) and len(np.unique(order)) == order.size
    np.testing.assert_array_equal(order, one.for_seed(0).order(4))
    assert not np.array_equal(order, one.order(5))
    assert not np.array_equal(order, one.for_seed(1).order(4))


def test_steps_neither_transfer_nor_recompile():
    one = experiment(model="logistic")
    state, order = one.init(), jax.device_put(one.order(0))
    state, _ = one.steps(state, order)
    with jax.transfer_guard("disallow"), jax.no_tracing():
        state, losses = one.steps(state, order)
    assert losses.shape == (len(order),)


def test_accuracy_ignores_the_padding():
    one = experiment(model="logistic")
    params = one.init().params
    logits = one.model.apply(
        {"params": params}, one.images.standardise(jnp.asarray(one.images.test))
    )
    expected = np.mean(np.argmax(logits, axis=-1) == one.images.test_labels)
    assert one.accuracy(params) == pytest.approx(expected)


def test_the_summary_is_that_of_the_mean_loss():
    one = experiment(model="logistic")
    state, used = one.init(), 1442 // 128 * 128
    x, labels = jnp.asarray(one.images.train[:used]), one.images.train_labels[:used]
    loss, gradient = jax.value_and_grad(one._loss)(state.params, x, labels)
    found = one.summary(state)
    norms = jnp.linalg.norm(gradient["Dense_0"]["kernel"], axis=1) / jnp.sqrt(10)
    assert found.strength_max == pytest.approx(float(norms.max()), rel=1e-4)
    expected = dx.objective(loss, state.params, one.structure, one.config.strength)
    assert found.objective == pytest.approx(float(expected), rel=1e-4)
    expected = dx.stationarity(state.params, gradient, one.structure, one.config.strength)
    assert found.stationarity == pytest.approx(float(expected), rel=1e-4)
    assert [row.path for row in found.rows] == ["Dense_0/bias", "Dense_0/kernel"]


def test_strips_show_the_share_left_of_each_input():
    kernel = jnp.ones((3, 3, 2, 4)).at[:, :, 1, :2].set(0.0)
    params = {"Conv_0": {"kernel": kernel, "bias": jnp.zeros(4)}}
    for regularizer, share in (("group_lasso", 1.0), ("l1", 0.5), ("none", 0.5)):
        one = experiment(model="conv", regularizer=regularizer)
        (strip,) = one.strips(params).values()
        np.testing.assert_array_equal(strip, [1.0, share])


def test_strips_of_a_nuclear_norm_are_ranks():
    params = {"Dense_0": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}
    (strip,) = experiment(model="logistic", regularizer="nuclear").strips(params).values()
    np.testing.assert_array_equal(strip, [1.0, 0.0, 0.0])


def test_refusals(tmp_path):
    one = experiment(model="logistic")
    (tmp_path / "something").touch()
    with pytest.raises(FileExistsError, match="not empty: give another --out, or continue"):
        loop.train(one, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; start the run anew"):
        loop.train(one, tmp_path, resume=True)


def test_divergence_is_said(tmp_path):
    wild = experiment("prox_sgd", "logistic", learning_rate=1e38, stages=1)
    with pytest.raises(FloatingPointError, match="training diverged; lower --learning-rate"):
        loop.train(wild, tmp_path / "run")
