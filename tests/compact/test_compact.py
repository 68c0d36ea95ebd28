"""What `compact` promises beside equality: nothing dead, constants, other shapes, misuse, scans."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close, rounding

from optax_structured import compact


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (3, 4), "bias": (4,), "down": (4, 2)}
    made = zip(shapes, keys, strict=True)
    return {name: jax.random.normal(key, shapes[name], dtype) for name, key in made}


X = jnp.linspace(-1, 1, 15).reshape(5, 3)


def test_without_anything_dead_it_is_the_original():
    params = parameters()
    small = compact.compact(mlp, params, X)
    assert small.fn is mlp
    assert small.params is params
    assert "nothing is dead" in str(small.report)


def test_a_constant_unit_is_added_up_where_it_is_read():
    params = parameters()
    params["up"] = params["up"].at[:, 1].set(0)
    params["bias"] = params["bias"].at[1].set(2.0)
    small = compact.compact(mlp, params, X)
    assert {name: leaf.shape for name, leaf in small.params.items()} == {
        "up": (3, 3),
        "bias": (3,),
        "down": (3, 2),
    }
    assert small.report.constants == 2
    assert_close(small.fn(small.params, X), mlp(params, X), rounding("float32"))


@pytest.mark.slow
def test_inputs_of_other_shapes_and_gradients():
    params = parameters()
    params["down"] = params["down"].at[2].set(0)
    small = compact.compact(mlp, params, jax.ShapeDtypeStruct((5, 3), jnp.float32))
    assert small.params["up"].shape == (3, 3)
    assert_close(jax.jit(small.fn)(small.params, X[:2]), mlp(params, X[:2]), rounding("float32"))
    rows = jax.vmap(lambda row: small.fn(small.params, row[None])[0])(X)
    assert_close(rows, mlp(params, X), rounding("float32"))
    gradient = jax.grad(lambda p, f: (f(p, X) ** 2).sum())
    expected = gradient(params, mlp)["up"][:, np.array([0, 1, 3])]
    assert_close(gradient(small.params, small.fn)["up"], expected, 5 * rounding("float32"))


def test_all_zero_before_a_bias_leaves_the_bias():
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.arange(2.0)}
    small = compact.compact(lambda p, x: x @ p["kernel"] + p["bias"], params, X)
    assert small.params["kernel"].size == 0
    np.testing.assert_array_equal(small.fn(small.params, X), np.tile([0.0, 1.0], (5, 1)))


def test_python_that_reads_numbers_is_named():
    def fn(params, x):
        return x if params["up"][0, 0] > 0 else -x

    with pytest.raises(TypeError, match="reads the numbers of its parameters"):
        compact.compact(fn, parameters(), X)


def test_other_parameters_are_refused():
    params = parameters()
    params["down"] = params["down"].at[2].set(0)
    small = compact.compact(mlp, params, X)
    with pytest.raises(ValueError, match="not parameters of the smaller function"):
        small.fn(params, X)


def stacked(params, x):
    def layer(x, kernels):
        up, down = kernels
        return x + jnp.tanh(x @ up) @ down, x.sum()

    return jax.lax.scan(layer, x, (params["up"], params["down"]))


@pytest.mark.slow
def test_stacked_layers_are_cut_when_they_are_written_out():
    keys = jax.random.split(jax.random.key(1))
    params = {
        "up": jax.random.normal(keys[0], (2, 3, 5)),
        "down": jax.random.normal(keys[1], (2, 5, 3)).at[:, 1:3].set(0),
    }
    whole = compact.compact(stacked, params, X)
    assert whole.fn is stacked
    assert whole.report.unknown == {"scan": 1}
    small = compact.compact(stacked, params, X, unroll=True)
    assert small.params["up"].shape == (2, 3, 3)
    assert small.params["down"].shape == (2, 3, 3)
    for found, expected in zip(small.fn(small.params, X), stacked(params, X), strict=True):
        assert_close(found, expected, 5 * rounding("float32"))


@pytest.mark.slow
def test_bfloat16():
    params = parameters(jnp.bfloat16)
    params["down"] = params["down"].at[2].set(0)
    x = X.astype(jnp.bfloat16)
    small = compact.compact(mlp, params, x)
    found = small.fn(small.params, x)
    assert found.dtype == jnp.bfloat16
    assert_close(found, mlp(params, x), rounding("bfloat16"))


@pytest.mark.slow
def test_files_run_without_this_library(tmp_path):
    params = parameters()
    params["down"] = params["down"].at[2].set(0)
    small = compact.compact(mlp, params, X)
    compact.save(tmp_path, small, X)
    np.save(tmp_path / "x.npy", X)
    code = """
import sys, jax, numpy as np
program = jax.export.deserialize(bytearray(open("program.stablehlo", "rb").read()))
made = program.call([*np.load("params.npz").values()], np.load("x.npy"))
np.save("made.npy", made)
assert "optax_structured" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_close(np.load(tmp_path / "made.npy"), mlp(params, X), rounding("float32"))
