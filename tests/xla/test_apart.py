"""Parts of a program that are compiled as programs of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_structured.xla.apart import apart


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def negatives(xs):
    return [jnp.where(x < 0, jax.nn.relu(-x), 0) for x in xs]


def twice_apart(xs):
    return apart(negatives, apart(negatives, xs))


def calls(function):
    """Calls that are left in the compiled program."""
    xs = [jax.ShapeDtypeStruct((3,), jnp.float32)] * 2
    return jax.jit(lambda xs: function(xs)).lower(xs).compile().as_text().count(" call(")


def test_it_is_called_and_what_it_calls_is_inlined():
    assert calls(negatives) == 0
    assert calls(twice_apart) == 2


def test_it_computes_what_the_function_does():
    xs = [jnp.array([-1.0, 2.0]), jnp.array([3.0, -4.0])]
    part = jax.jit(lambda xs: apart(negatives, xs))
    np.testing.assert_array_equal(part(xs), [[1, 0], [0, 4]])
    np.testing.assert_array_equal(jax.vmap(part)(xs), [[1, 0], [0, 4]])
    np.testing.assert_array_equal(apart(negatives, xs), [[1, 0], [0, 4]])
    slope = jax.grad(lambda xs: sum(map(jnp.sum, part(xs))))(xs)
    np.testing.assert_array_equal(slope, [[-1, 0], [0, -1]])


def test_it_may_close_over_what_is_traced():
    def scaled(x, scale):
        return apart(lambda x: scale * x, x)

    np.testing.assert_array_equal(jax.jit(scaled)(jnp.ones(2), 3.0), [3, 3])


@pytest.mark.parametrize(
    "name, result", [("device_count", 8), ("default_backend", "gpu")], ids=["devices", "backend"]
)
def test_elsewhere_it_is_the_function(name, result, monkeypatch):
    monkeypatch.setattr(jax, name, lambda: result)
    assert calls(twice_apart) == 0
