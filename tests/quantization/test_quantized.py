"""Optimizers whose state is stored in codes. What all optimizers do is in tests/contracts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import assert_close, assert_equal, jitted, normal_tree, run
from tolerances import rounding

import optax_structured as oxs
from optax_structured.quantization import DynamicCode

SHAPES = {"embed": (16, 64), "dense": {"kernel": (32, 24), "bias": (24,)}, "gain": ()}
ADAM = optax.adam(1e-2)
SPEC = oxs.LowRank(4, period=2)
INNER = {
    "adam": ADAM,
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "rmsprop": optax.rmsprop(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "adafactor": optax.adafactor(1e-2, momentum=0.9),
    "galore": oxs.galore(1e-2, SPEC),
    "fira": oxs.fira(1e-2, SPEC),
}
every_inner = pytest.mark.parametrize("name", INNER)


def params():
    return normal_tree("params", SHAPES)


def gradients(step):
    return normal_tree(step, SHAPES)


def stored(state):
    """Paths of the arrays of a state that are in codes."""
    leaves = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, DynamicCode))
    return {jax.tree_util.keystr(path) for path, x in leaves if isinstance(x, DynamicCode)}


@pytest.mark.slow
@every_inner
def test_without_large_leaves_it_is_the_inner_optimizer_bit_for_bit(name):
    grads = [gradients(i) for i in range(4)]
    expected, plain = run(oxs.skip_nonfinite(INNER[name]), params(), grads)
    got, state = run(oxs.quantized(INNER[name], min_size=math.inf), params(), grads)
    assert_equal(got, expected)
    assert_equal(state.inner_state.inner, plain.inner_state)


@every_inner
@pytest.mark.parametrize(
    "codec",
    [
        pytest.param(oxs.Dynamic(), id="8"),
        pytest.param(oxs.Dynamic(4, block=128), id="4", marks=pytest.mark.slow),
    ],
)
def test_few_bits_follow_32_bits(name, codec):
    """The bound is a step or two of the four: entries near 0 may take either sign."""
    grads = [gradients(i) for i in range(4)]
    expected, _ = run(INNER[name], params(), grads)
    got, state = run(oxs.quantized(INNER[name], codec, min_size=32), params(), grads)
    assert stored(state)
    for g, e, p in zip(*map(jax.tree.leaves, (got, expected, params())), strict=True):
        apart = np.linalg.norm(g - e) / np.linalg.norm(e - p)
        assert apart <= (0.05 if codec.bits == 8 else 0.5), name


@pytest.mark.slow
def test_the_first_step_sees_moments_that_were_never_rounded():
    expected, _ = run(ADAM, params(), [gradients(0)])
    got, _ = run(oxs.quantized(ADAM, min_size=0), params(), [gradients(0)])
    assert_close(got, expected, rounding("float32"))


def test_leaves_below_the_size_keep_float32():
    state = oxs.quantized(ADAM, min_size=100).init(params())
    adam = state.inner_state.inner[0]
    for moment in (adam.mu, adam.nu):
        assert isinstance(moment["embed"], DynamicCode)
        assert isinstance(moment["dense"]["kernel"], DynamicCode)
        assert moment["dense"]["bias"].dtype == moment["gain"].dtype == jnp.float32


def test_rules_say_which_leaves_and_how():
    codec = oxs.rules(("embed", None), ("bias", oxs.Dynamic(4)), default=oxs.Dynamic())
    tx = oxs.quantized(ADAM, codec, min_size=0)
    adam = tx.init(params()).inner_state.inner[0]
    assert adam.mu["embed"].dtype == jnp.float32
    assert adam.mu["dense"]["kernel"].codes.nbytes == 32 * 24
    assert adam.mu["dense"]["bias"].codes.nbytes == 24 / 2
    grads = [gradients(i) for i in range(3)]
    got, _ = run(tx, params(), grads)
    expected, _ = run(ADAM, params(), grads)
    assert_close(got["embed"], expected["embed"], rounding("float32"))
    assert not jnp.array_equal(got["dense"]["kernel"], expected["dense"]["kernel"])


def test_first_moments_have_a_sign_and_second_moments_none():
    tx = oxs.quantized(ADAM, min_size=0)
    grads = jax.tree.map(lambda g: -jnp.abs(g), gradients(0))
    _, state = run(tx, params(), [grads])
    mu, nu = (x["embed"] for x in (state.inner_state.inner[0].mu, state.inner_state.inner[0].nu))
    gradient = grads["embed"]
    np.testing.assert_allclose(oxs.Dynamic().decode(mu), 0.1 * gradient, atol=0.01)
    unsigned = oxs.Dynamic(signed=False).decode(nu)
    np.testing.assert_allclose(unsigned, 1e-3 * gradient**2, atol=1e-4)


def test_of_the_low_rank_state_only_moments_are_encoded():
    state = oxs.quantized(oxs.galore(1e-2, SPEC), min_size=32).init(params())
    found = stored(state)
    assert found and all(".mu" in path or ".nu" in path for path in found)
    bases = jax.tree.leaves(state.inner_state.inner[0].bases)
    assert any(x.dtype == jnp.float32 and x.size >= 32 for x in bases)
    outside, inside = (
        tx.init(params())
        for tx in (
            oxs.quantized(oxs.galore(1e-2, SPEC), min_size=32),
            oxs.galore(1e-2, SPEC, inner=oxs.quantized(optax.scale_by_adam(), min_size=32)),
        )
    )
    assert len(stored(inside)) == len(stored(outside))


def test_the_learning_rate_can_be_injected_inside():
    tx = oxs.quantized(optax.inject_hyperparams(optax.adam)(1e-2), min_size=32)
    state = tx.init(params())
    assert stored(state)
    state.inner_state.inner.hyperparams["learning_rate"] = jnp.asarray(0.0)
    got, _ = jitted(tx)(gradients(0), state, params())
    assert_equal(got, params())


def test_accumulated_gradients_inside_stay_exact():
    tx = oxs.quantized(optax.MultiSteps(ADAM, 2).gradient_transformation(), min_size=32)
    grads = [gradients(i) for i in range(4)]
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    got, state = run(tx, params(), grads)
    assert stored(state) and not any("acc_grads" in path for path in stored(state))
    expected, _ = run(ADAM, params(), means)
    for g, e, p in zip(*map(jax.tree.leaves, (got, expected, params())), strict=True):
        assert np.linalg.norm(g - e) <= 0.05 * np.linalg.norm(e - p)


def test_masked_and_partitioned_optimizers_inside():
    mask = {"embed": True, "dense": {"kernel": True, "bias": False}, "gain": False}
    labels = jax.tree.map(lambda on: "adam" if on else "sgd", mask)
    grads = [gradients(i) for i in range(3)]
    for inner in (
        optax.masked(ADAM, mask),
        optax.partition({"adam": ADAM, "sgd": optax.sgd(1e-2)}, labels),
    ):
        got, state = run(oxs.quantized(inner, min_size=32), params(), grads)
        assert len(stored(state)) == 4
        expected, _ = run(inner, params(), grads)
        assert_close(got["dense"]["bias"], expected["dense"]["bias"], rounding("float32"))


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = oxs.quantized(inner)
    got, _ = tx.update(gradients(0), tx.init(params()), params(), factor=3.0)
    assert_equal(got, jax.tree.map(lambda g: 3.0 * g, gradients(0)))


@pytest.mark.slow
def test_parameters_are_not_needed_where_the_inner_optimizer_needs_none():
    tx = oxs.quantized(optax.scale_by_adam(), min_size=32)
    state = tx.init(params())
    got, _ = tx.update(gradients(0), state)
    expected, _ = tx.update(gradients(0), state, params())
    assert_equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_moments_of_narrow_parameters_are_computed_in_float32(dtype):
    """Optax keeps moments in the dtype of the parameters; codes decode to float32."""
    start, grads = (normal_tree(name, SHAPES, dtype) for name in ("params", 0))
    tx = oxs.quantized(optax.scale_by_adam(), min_size=32)
    state = tx.init(start)
    updates, state = tx.update(grads, state, start)
    assert {u.dtype for u in jax.tree.leaves(updates)} <= {jnp.dtype(dtype), jnp.dtype("float32")}
    wide = oxs.Dynamic(signed=False).decode(state.inner_state.inner.nu["embed"])
    square = 1e-3 * grads["embed"].astype(jnp.float32) ** 2
    np.testing.assert_allclose(wide, square, atol=0.01 * float(square.max()))


class SketchState(NamedTuple):
    sketch: object


def sketching():
    return optax.GradientTransformation(
        lambda params: SketchState(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (updates, SketchState(updates)),
    )


def test_fields_of_other_states_are_added_to_the_table():
    fields = {"SketchState": {"sketch": "first_moment"}}
    tx = oxs.quantized(sketching(), fields=fields, min_size=32)
    _, state = run(tx, params(), [gradients(0)])
    assert len(stored(state)) == 2
    decoded = oxs.Dynamic().decode(state.inner_state.inner.sketch["embed"])
    np.testing.assert_allclose(decoded, gradients(0)["embed"], atol=0.05)
    plain = oxs.quantized(sketching(), fields={"SketchState": {"sketch": "wide"}}, min_size=0)
    assert not stored(plain.init(params()))


MISUSE = [
    (
        "unknown-state",
        lambda: oxs.quantized(sketching(), min_size=32).init(params()),
        r"nothing is known of SketchState.sketch \(shape \(32, 24\)\); say what it is:\n    "
        r"oxs.quantized\(inner, fields={\"SketchState\": {\"sketch\": \"first_moment\"}}\)\n",
    ),
    ("not-a-codec", lambda: oxs.quantized(ADAM, 8), r"quantized takes .*Dynamic\(bits=8.*, got 8$"),
    ("affine", lambda: oxs.quantized(ADAM, oxs.Affine()), "equal steps.*use Dynamic"),
    (
        "affine-in-rules",
        lambda: oxs.quantized(ADAM, oxs.rules(("embed", oxs.Affine()), default=None)),
        "equal steps.*use Dynamic",
    ),
    ("size", lambda: oxs.quantized(ADAM, min_size=-1), "min_size must be a number of entries"),
    ("nan", lambda: oxs.quantized(ADAM, min_size=math.nan), "min_size must be a number of entries"),
    (
        "dead-pattern",
        lambda: oxs.quantized(ADAM, oxs.rules(("emebd", None), default=oxs.Dynamic())).init(
            params()
        ),
        "pattern 'emebd' matches no parameter path; the nearest paths are 'embed'",
    ),
]


@pytest.mark.parametrize(
    ("thunk", "message"), [line[1:] for line in MISUSE], ids=[line[0] for line in MISUSE]
)
def test_misuse(thunk, message):
    with pytest.raises((ValueError, TypeError), match="(?s)" + message):
        thunk()
