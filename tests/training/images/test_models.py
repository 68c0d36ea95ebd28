"""The networks: the fast convolution and pooling against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import reordered

from optax_structured.training.images import models


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 1])
def test_conv_equals_the_convolution_of_xla(padding):
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 3))
    layer = models.Conv(4, window=3, padding=padding)
    params = layer.init(jax.random.key(1), x)
    kernel = params["params"]["kernel"]
    border = ((padding, padding), (padding, padding))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), border, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=reordered(x.dtype))


def test_max_pool_drops_the_odd_border():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    window = (1, 2, 2, 1)
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    np.testing.assert_array_equal(models.max_pool(x), expected)


@pytest.mark.parametrize(
    ("name", "image", "kernels"),
    [
        ("conv", (8, 8, 1), [(3, 3, 1, 16), (3, 3, 16, 32), (128, 64), (64, 10)]),
        ("lenet", (28, 28, 1), [(5, 5, 1, 20), (5, 5, 20, 50), (800, 500), (500, 10)]),
        ("logistic", (8, 8, 1), [(64, 10)]),
    ],
)
def test_kernels_have_the_published_shapes(name, image, kernels):
    model = models.make(name, image, 10)
    params = jax.eval_shape(lambda key: models.init(model, image, key), jax.random.key(0))
    assert [layer["kernel"].shape for layer in params.values()] == kernels


def test_mlp_is_the_published_one():
    model = models.make("mlp", (28, 28, 1), 10)
    params = jax.eval_shape(lambda key: models.init(model, (28, 28, 1), key), jax.random.key(0))
    widths = [layer["kernel"].shape[1] for layer in params.values()]
    assert widths == [512, 256, 128, 64, 32, 16, 10]


def test_cross_entropy_by_hand():
    logits, labels = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]])), jnp.array([1, 0])
    expected = -(np.log(0.75) + np.log(0.5)) / 2
    np.testing.assert_allclose(models.cross_entropy(logits, labels), expected, rtol=1e-6)


def test_wrong_names_and_sizes():
    with pytest.raises(ValueError, match="'vgg': choose one of conv, lenet, mlp, logistic"):
        models.make("vgg", (8, 8, 1), 10)
    with pytest.raises(ValueError, match="at least 16x16 .* these are 8x8: use --model conv"):
        models.make("lenet", (8, 8, 1), 10)
