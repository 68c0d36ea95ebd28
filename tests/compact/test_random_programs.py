"""Random small programs with random zeros: the smaller program is equal, and never larger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import REORDERED

from optax_structured.compact import compact

CLOSE = REORDERED["float64"]


class Maker:
    """Parameters that a program asks for as it is built; zeros along random axes."""

    def __init__(self, seed):
        self.random, self.leaves = np.random.default_rng(seed), []

    def __call__(self, *shape):
        leaf = self.random.normal(size=shape)
        for axis, n in enumerate(shape):
            if self.random.random() < 0.6:
                dead = self.random.random(n) < 0.5
                leaf[(slice(None),) * axis + (dead,)] = 0
        self.leaves.append(leaf)
        return len(self.leaves) - 1


# Each takes the maker and the shape (batch, positions, features), and returns (params, x) -> x.
def dense(make, shape):
    kernel, bias = make(shape[2], 4), make(4)
    return lambda p, x: x @ p[kernel] + p[bias]


def tanh_mlp(make, shape):
    up, down, bias = make(shape[2], 6), make(6, shape[2]), make(6)
    return lambda p, x: x + jnp.tanh(x @ p[up] + p[bias]) @ p[down]


def relu(make, shape):
    return lambda p, x: jax.nn.relu(x)


def gated(make, shape):
    up, gate, down = make(shape[2], 6), make(shape[2], 6), make(6, 4)
    return lambda p, x: (jax.nn.silu(x @ p[gate]) * (x @ p[up])) @ p[down]


def scale(make, shape):
    gain, shift = make(shape[2]), make(shape[2])
    return lambda p, x: x * p[gain] + p[shift]


def rms_norm(make, shape):
    gain = make(shape[2])
    return lambda p, x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p[gain]


def layer_norm(make, shape):
    return lambda p, x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def attention(make, shape):
    width = shape[2]
    q, k, v, o = make(width, 6), make(width, 6), make(width, 2, 3), make(2, 3, width)

    def run(p, x):
        a, b = ((x @ p[w]).reshape(*x.shape[:2], 2, 3) for w in (q, k))
        c = jnp.einsum("btd,dhe->bthe", x, p[v])
        weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", a, b))
        return x + jnp.einsum("bhqk,bkhe,hed->bqd", weights, c, p[o])

    return run


def convolution(make, shape):
    kernel, bias = make(3, shape[2], 4), make(4)

    def run(p, x):
        numbers = ("NTC", "TIO", "NTC")
        made = jax.lax.conv_general_dilated(x, p[kernel], (1,), "SAME", dimension_numbers=numbers)
        return made + p[bias]

    return run


def depthwise(make, shape):
    kernel = make(2, 1, shape[2] * 2)

    def run(p, x):
        numbers = ("NTC", "TIO", "NTC")
        return jax.lax.conv_general_dilated(
            x, p[kernel], (1,), "VALID", None, None, numbers, feature_group_count=x.shape[2]
        )

    return run


def pool(make, shape):
    def run(p, x):
        window = (1, 2, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")

    return run


def merged(make, shape):
    flat, back = make(shape[1] * shape[2], 8), make(8)
    return lambda p, x: (x.reshape(len(x), -1) @ p[flat] * p[back]).reshape(len(x), 2, 4)


def branches(make, shape):
    kernel = make(shape[2], 4)

    def run(p, x):
        a, b = jnp.split(x @ p[kernel], 2, axis=-1)
        return jnp.concatenate([b, a[..., ::-1], x[..., 1:]], axis=-1)

    return run


def padded(make, shape):
    return lambda p, x: jnp.pad(x, ((0, 0), (1, 0), (0, 2)))


def stacked(make, shape):
    kernel = make(shape[2])

    def run(p, x):
        x = jnp.stack([x * p[kernel], jnp.tile(x[:, :1], (1, x.shape[1], 1)), x[:, ::-1]], axis=1)
        a, b, c = jnp.unstack(x, axis=1)
        return jnp.tanh(a + c), b

    return lambda p, x: sum(run(p, x))


def turned(make, shape):
    return lambda p, x: x.transpose(0, 2, 1)


def chosen(make, shape):
    other = make(shape[2])
    return lambda p, x: jnp.where(x > 0.1, x, p[other])


def summed(make, shape):
    return lambda p, x: jnp.cumsum(x, axis=1) + x.max(axis=1, keepdims=True)


def looked_up(make, shape):
    table = make(5, 4)
    return lambda p, x: p[table][jnp.argmax(x, axis=-1)]


def unknown(make, shape):
    return lambda p, x: jnp.real(jnp.fft.fft(x, axis=1))


def ranked(make, shape):
    return lambda p, x: jnp.sort(x, axis=1)


STEPS = [
    dense,
    tanh_mlp,
    relu,
    gated,
    scale,
    rms_norm,
    layer_norm,
    attention,
    convolution,
    depthwise,
    pool,
    merged,
    branches,
    padded,
    stacked,
    turned,
    chosen,
    summed,
    looked_up,
    unknown,
    ranked,
]


def products(fn, *arguments):
    """Multiplications in matrix products; convolutions by the size of kernel and result."""
    count = 0
    for equation in jax.make_jaxpr(fn)(*arguments).eqns:
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            summed = equation.params["dimension_numbers"][0][0]
            count += np.prod(shapes[-1]) * np.prod([shapes[0][k] for k in summed])
        if equation.primitive.name == "conv_general_dilated":
            count += np.prod(shapes[-1]) * np.prod(shapes[1][:-1])
    return count


def check(steps, seed):
    make, shape, runs = Maker(seed), (2, 3, 4), []
    x = make.random.normal(size=shape)
    for step in steps:
        runs.append(step(make, shape))
        abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in make.leaves]
        shape = jax.eval_shape(runs[-1], abstract, jax.ShapeDtypeStruct(shape, x.dtype)).shape

    def fn(params, x):
        for run in runs:
            x = run(params, x)
        return x

    params = list(map(jnp.asarray, make.leaves))
    small = compact(fn, params, x)
    assert small.report.params[1] <= small.report.params[0]
    assert products(small.fn, small.params, x) <= products(fn, params, x)
    original, smaller = jax.jit(fn), jax.jit(small.fn)
    for inputs in (x, make.random.normal(size=x.shape)):
        expected, found = original(params, inputs), smaller(small.params, inputs)
        np.testing.assert_allclose(found, expected, atol=CLOSE, rtol=CLOSE)
    again = compact(small.fn, small.params, x)
    assert again.report.params[1] == small.report.params[1]


QUICK = (dense, attention, merged, unknown)


@pytest.mark.parametrize(
    "step",
    [step if step in QUICK else pytest.param(step, marks=pytest.mark.slow) for step in STEPS],
    ids=lambda step: step.__name__,
)
def test_each_step_between_dense_layers(step):
    with jax.enable_x64():
        check([dense, relu, step, dense], seed=3)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_programs(steps, seed):
    with jax.enable_x64():
        check(steps, seed)
