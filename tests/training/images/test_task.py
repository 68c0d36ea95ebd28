"""What the image task measures: order of the data, error, summary, strips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_small import images

from optax_structured import diagnostics as dx


def test_the_order_depends_on_seed_and_epoch_alone():
    one = images(model="mlp")
    epoch = 1442 // 128

    def order(task, number):
        return task.batches(number * epoch, epoch)[:epoch]

    assert len(np.unique(order(one, 4))) == epoch * 128
    np.testing.assert_array_equal(order(one, 4), order(one.variant(learning_rate=1.0), 4))
    assert not np.array_equal(order(one, 4), order(one, 5))
    assert not np.array_equal(order(one, 4), order(one.variant(seed=1), 4))
    np.testing.assert_array_equal(one.batches(4 * epoch + 3, 2)[:2], order(one, 4)[3:5])


@pytest.mark.slow
def test_steps_neither_transfer_nor_recompile():
    one = images()
    state, batches = one.init(), jax.device_put(one.batches(0, 5))
    rate, count = jnp.float32(0.1), jnp.int32(5)
    state, _ = one._steps(state, one.train, batches, rate, count)
    with jax.transfer_guard("disallow"), jax.no_tracing():
        state, losses = one._steps(state, one.train, batches, rate, count)
    assert losses.shape == (one.steps_a_call,)


def test_the_error_ignores_the_padding():
    one = images()
    params = one.init().params
    logits = one.model.apply(
        {"params": params}, one.images.standardise(jnp.asarray(one.images.test))
    )
    expected = np.mean(np.argmax(logits, axis=-1) != one.images.test_labels)
    assert one.error(params) == pytest.approx(expected)


@pytest.mark.slow
def test_the_summary_is_that_of_the_mean_loss():
    one = images()
    state, used = one.init(), 1442 // 128 * 128
    x, labels = jnp.asarray(one.images.train[:used]), one.images.train_labels[:used]
    loss, gradient = jax.value_and_grad(one.loss)(state.params, (x, labels), jnp.arange(used))
    found = one.summary(state)
    norms = jnp.linalg.norm(gradient["Dense_0"]["kernel"], axis=1) / jnp.sqrt(10)
    (row,) = (row for row in found.rows if row.strength_max is not None)
    assert row.strength_max == pytest.approx(float(norms.max()), rel=1e-4)
    expected = dx.objective(loss, state.params, one.structure, one.config.strength)
    assert found.objective == pytest.approx(float(expected), rel=1e-4)
    expected = dx.stationarity(state.params, gradient, one.structure, one.config.strength)
    assert found.stationarity == pytest.approx(float(expected), rel=1e-4)
    assert [row.path for row in found.rows] == ["Dense_0/bias", "Dense_0/kernel"]


def test_strips_show_the_share_left_of_each_input():
    kernel = jnp.ones((3, 3, 2, 4)).at[:, :, 1, :2].set(0.0)
    params = {"Conv_0": {"kernel": kernel, "bias": jnp.zeros(4)}}
    for regularizer, share in (("group_lasso", 1.0), ("l1", 0.5), ("none", 0.5)):
        one = images(model="conv", regularizer=regularizer)
        (strip,) = one.strips(params).values()
        np.testing.assert_array_equal(strip, [1.0, share])


def test_strips_of_a_nuclear_norm_are_ranks():
    params = {"Dense_0": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}
    (strip,) = images(regularizer="nuclear").strips(params).values()
    np.testing.assert_array_equal(strip, [1.0, 0.0, 0.0])
