"""DiffROAR: the published masks, and data sets where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import FOLDER, load

from optax_structured.contrib.scores import (
    block_images,
    diffroar,
    mask_dataset,
    null_share,
    rank_by_input_gradient,
)

FILES = sorted(path.stem for path in FOLDER.glob("diffroar-*.npz"))


def ranks_of(gradients):
    """Through the function that differentiates: a loss that is linear in the inputs."""
    return rank_by_input_gradient(lambda x, g: jnp.sum(x * g), jnp.zeros_like(gradients), gradients)


@pytest.mark.parametrize("name", FILES)
def test_golden(name):
    golden = load(name)
    x, gradients = (jnp.asarray(golden.arrays[f"inputs/{key}"]) for key in ("X", "gradients"))
    ranks, value = ranks_of(gradients), golden.meta["mask_value"]
    np.testing.assert_allclose(jnp.mean(x), value, rtol=1e-5)
    tested = 0
    for most_important, key in ((True, "mask_most_important"), (False, "mask_least_important")):
        for fraction, want in golden.leaves(f"outputs/{key}").items():
            got = mask_dataset(x, ranks, float(fraction), value, most_important=most_important)
            np.testing.assert_array_equal(got, want)
            tested += 1
    assert tested == 2 * len(golden.arrays["inputs/fractions"])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 1.0])
def test_masks_of_both_ends(fraction):
    """Counts are rounded as Python rounds, half to even: 0.25 * 10 is 2."""
    x = jnp.ones((4, 10))
    ranks = ranks_of(jax.random.normal(jax.random.key(0), x.shape))
    masked = [mask_dataset(x, ranks, fraction, 0.0, most_important=m) == 0 for m in (True, False)]
    for ends in masked:
        np.testing.assert_array_equal(ends.sum(-1), round(fraction * 10))
    if fraction < 0.5:
        assert not jnp.any(masked[0] & masked[1])


def test_ties_go_by_position_and_both_ends_share_no_coordinate():
    x = jnp.ones((1, 4))
    ranks = ranks_of(jnp.zeros((1, 4)))
    np.testing.assert_array_equal(ranks, [[0, 1, 2, 3]])
    top, bottom = (mask_dataset(x, ranks, 0.5, 0.0, most_important=m) for m in (True, False))
    np.testing.assert_array_equal(top + bottom, 1.0)


def least_squares(labels, test_labels):
    """Retraining by a closed form: accuracy of the sign of ridge regression."""

    def power(key, x, x_test):
        x, x_test = x.reshape(len(x), -1), x_test.reshape(len(x_test), -1)
        rows = jax.random.choice(key, len(x), (len(x),))  # a bootstrap a run
        gram = x[rows].T @ x[rows] + jnp.eye(x.shape[1])
        w = jnp.linalg.solve(gram, x[rows].T @ labels[rows])
        return jnp.mean(jnp.sign(x_test @ w) == test_labels)

    return power


def linear_task(n=400, d=10):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(2.0 ** -np.arange(d), jnp.float32)
    x, x_test = jnp.asarray(rng.standard_normal((2, n, d)), jnp.float32)
    return weights, x, x_test, jnp.sign(x @ weights), jnp.sign(x_test @ weights)


def test_of_a_linear_model_is_positive():
    w, x, x_test, y, y_test = linear_task()
    ranks = [rank_by_input_gradient(lambda x: x @ w, data) for data in (x, x_test)]
    keys = jax.random.split(jax.random.key(0), 3)
    found = diffroar(
        least_squares(y, y_test), keys, (x, ranks[0]), (x_test, ranks[1]), (0.2, 0.5, 1.0)
    )
    assert found.top.shape == found.bottom.shape == (3, 3)
    assert jnp.all(found.mean[:2] > 0.1)
    # All is kept: top and bottom are one data set.
    np.testing.assert_array_equal(found.top[2], found.bottom[2])
    pairs = found.top[0][:, None] - found.bottom[0]
    np.testing.assert_allclose(
        [found.mean[0], found.std[0]], [pairs.mean(), pairs.std()], atol=1e-6
    )


def test_of_random_ranks_is_noise():
    _, x, x_test, y, y_test = linear_task()
    ranks = [ranks_of(jax.random.normal(jax.random.key(i), x.shape)) for i in range(2)]
    keys = jax.random.split(jax.random.key(0), 3)
    found = diffroar(least_squares(y, y_test), keys, (x, ranks[0]), (x_test, ranks[1]), (0.5,))
    assert jnp.all(jnp.abs(found.mean) < 0.1)


def test_block_images_and_their_null_share():
    signal = jnp.arange(1.0, 201).reshape(50, 2, 2)
    images, top = block_images(jax.random.key(0), signal, jnp.zeros((2, 2)))
    assert 5 < top.sum() < 45
    np.testing.assert_array_equal(images[:, :2] + images[:, 2:], signal)
    np.testing.assert_array_equal(images[top, 2:], 0.0)
    np.testing.assert_array_equal(null_share(images, top), 0.0)
    np.testing.assert_array_equal(null_share(images, ~top), 1.0)
    np.testing.assert_array_equal(null_share(jnp.zeros_like(images), top), 0.0)
    _, always = block_images(jax.random.key(0), signal, jnp.zeros((2, 2)), signal_on_top=True)
    assert jnp.all(always)


def test_jit_and_vmap():
    w, x, *_ = linear_task(n=8)
    ranks = jax.jit(lambda x: rank_by_input_gradient(lambda x: x @ w, x))(x)
    many = jax.vmap(lambda x: rank_by_input_gradient(lambda x: x @ w, x))(jnp.stack([x, x]))
    np.testing.assert_array_equal(many, jnp.stack([ranks, ranks]))


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 20"):
        mask_dataset(jnp.ones((1, 4)), jnp.zeros((1, 4), int), 20, 0.0)
