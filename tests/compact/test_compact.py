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
@pytest.mark.parametrize("unroll", [False, True], ids=["one body", "written out"])
def test_stacked_layers_are_cut(unroll):
    """One body has the same cut in every layer; written out, each layer has its own."""
    keys = jax.random.split(jax.random.key(1))
    params = {
        "up": jax.random.normal(keys[0], (2, 3, 5)),
        "down": jax.random.normal(keys[1], (2, 5, 3)).at[:, 1:3].set(0).at[1, 3].set(0),
    }
    small = compact.compact(stacked, params, X, unroll=unroll)
    assert small.params["up"].shape == (2, 3, 3)
    assert small.params["down"].shape == (2, 3, 3)
    assert not small.report.unknown
    made = jax.jit(small.fn)(small.params, X)
    for found, expected in zip(made, stacked(params, X), strict=True):
        assert_close(found, expected, 5 * rounding("float32"))
    again = compact.compact(small.fn, small.params, X, unroll=unroll)
    assert again.report.params[1] == small.report.params[1]


@pytest.mark.slow
def test_unroll_takes_what_is_smaller():
    random = np.random.default_rng(0)
    shapes = {"up": (2, 3, 4), "down": (2, 4, 3)}
    whole = {name: jnp.asarray(random.normal(size=n), jnp.float32) for name, n in shapes.items()}
    alike = whole | {"down": whole["down"].at[:, 1].set(0)}
    loop, asked = (compact.compact(stacked, alike, X, unroll=unroll) for unroll in (False, True))
    assert "scan" in str(jax.make_jaxpr(asked.fn)(asked.params, X))
    assert asked.report == loop.report
    assert compact.compact(stacked, whole, X, unroll=True).fn is stacked
    # Every unit is alive in one of the layers.
    apart = whole | {"down": whole["down"].at[0, :3].set(0).at[1, 3].set(0)}
    assert compact.compact(stacked, apart, X).fn is stacked
    small = compact.compact(stacked, apart, X, unroll=True)
    before, after = small.report.flops
    assert after < 0.7 * before
    assert "nothing is dead" not in str(small.report)
    made = zip(small.fn(small.params, X), stacked(apart, X), strict=True)
    for found, expected in made:
        assert_close(found, expected, 5 * rounding("float32"))


def test_operations_of_every_step_are_counted():
    """XLA counts the body of a loop once."""
    params = {"up": jnp.ones((4, 3, 5)), "down": jnp.ones((4, 5, 3))}
    (flops, _) = compact.compact(stacked, params, X).report.flops
    products = 4 * 2 * (5 * 3 * 5) * 2
    assert products < flops < 1.5 * products


@pytest.mark.slow
def test_a_stream_that_a_loop_carries_is_cut():
    """A feature that no layer writes is zero in all steps; one that nobody reads is not needed."""

    def fn(params, x):
        def layer(x, kernels):
            up, down = kernels
            return x + jnp.tanh(x @ up) @ down, None

        x = x @ params["embed"]
        return jax.lax.scan(layer, x, (params["up"], params["down"]))[0] @ params["head"]

    random = np.random.default_rng(0)
    shapes = {"embed": (3, 4), "up": (2, 4, 5), "down": (2, 5, 4), "head": (4, 2)}
    params = {name: jnp.asarray(random.normal(size=n), jnp.float32) for name, n in shapes.items()}
    params["embed"] = params["embed"].at[:, 0].set(0)
    params["down"] = params["down"].at[:, :, 0].set(0)  # feature 0 is zero for good
    params["up"] = params["up"].at[:, 2].set(0)
    params["head"] = params["head"].at[2].set(0)  # feature 2 is read by nobody
    small = compact.compact(fn, params, X)
    after = {name: leaf.shape for name, leaf in small.params.items()}
    assert after == {"embed": (3, 2), "up": (2, 2, 5), "down": (2, 5, 2), "head": (2, 2)}
    assert_close(small.fn(small.params, X), fn(params, X), 5 * rounding("float32"))
    small = compact.compact(fn, params | {"head": params["head"].at[1].set(0)}, X)
    assert small.params["embed"].shape == (3, 2)  # feature 1 is read inside the loop


@pytest.mark.slow
def test_bfloat16():
    params = parameters(jnp.bfloat16)
    params["down"] = params["down"].at[2].set(0)
    x = X.astype(jnp.bfloat16)
    small = compact.compact(mlp, params, x)
    found = small.fn(small.params, x)
    assert found.dtype == jnp.bfloat16
    assert_close(found, mlp(params, x), rounding("bfloat16"))


def test_the_report_says_what_dead_units_are_coupled_to():
    def fn(params, x):
        x = x @ params["embed"]
        x = x + jnp.tanh(x @ params["up"]) @ params["down"]
        return jnp.exp(x @ params["kernel"]).sum(-1), x @ params["head"]

    shapes = {"embed": (3, 4), "up": (4, 5), "down": (5, 4), "kernel": (4, 3), "head": (4, 2)}
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(random.normal(size=n)) for name, n in shapes.items()}
    params["down"] = params["down"].at[:, 1].set(0)  # a feature that lives on in the stream
    params["up"] = params["up"].at[:, 2].set(0)  # a unit: tanh of 0, which can go
    params["kernel"] = params["kernel"].at[:, 0].set(0)  # exp of 0 is added up
    params["head"] = params["head"].at[:, 1].set(0)
    small = compact.compact(fn, params, X)
    found = {(x.path, x.axis, x.count, x.reason) for x in small.report.stuck}
    assert found == {
        ("down", 1, 1, "coupled to embed, where they are alive"),
        ("kernel", 1, 1, "reduce_sum reads all of them"),
        ("head", 1, 1, "the output has all of them"),
    }
    assert small.report.blocked == 3
    assert small.params["up"].shape == (4, 4)


def test_times_features_and_a_picture():
    params = parameters()
    params["down"] = params["down"].at[2].set(0)
    linen = {"a": {"kernel": params["up"], "bias": params["bias"]}, "b": {"kernel": params["down"]}}

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]

    report = compact.compact(fn, linen, X, measure=True).report
    assert min(report.seconds) > 0
    assert " ms -> " in str(report)
    assert report.features == {"a": (4, 3), "b": (2, 2)}
    lengths = [bar.get_width() for bar in compact.draw(report).axes[0].patches]
    assert lengths == [12, 9, 8, 6]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files_run_without_this_library(tmp_path, kind):
    params = parameters()
    params["up"] = jnp.outer(params["up"][:, 0], params["bias"])  # that is kept as two factors
    params["down"] = params["down"].at[2].set(0)
    small = compact.compact(mlp, params, X)
    compact.save(tmp_path, small, X, safetensors=kind == "safetensors")
    np.save(tmp_path / "x.npy", X)
    read = "np.load('params.npz')"
    if kind == "safetensors":
        read = "__import__('safetensors.numpy').numpy.load_file('params.safetensors')"
    code = f"""
import sys, jax, numpy as np
program = jax.export.deserialize(bytearray(open("program.stablehlo", "rb").read()))
arrays = dict({read})
made = program.call([arrays[name] for name in sorted(arrays)], np.load("x.npy"))
np.save("made.npy", made)
assert "optax_structured" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_close(np.load(tmp_path / "made.npy"), mlp(params, X), rounding("float32"))


def test_bfloat16_needs_safetensors(tmp_path):
    params = parameters(jnp.bfloat16)
    params["down"] = params["down"].at[2].set(0)
    small = compact.compact(mlp, params, X.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="npz files do not hold: .*safetensors=True"):
        compact.save(tmp_path, small, X.astype(jnp.bfloat16))
    compact.save(tmp_path, small, X.astype(jnp.bfloat16), safetensors=True)
    assert (tmp_path / "params.safetensors").exists()
