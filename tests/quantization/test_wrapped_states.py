"""States that are not plain moments: codes already, other settings, other dtypes, effects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify, io_callback
from recipes_table import normal, normal_tree, run

import optax_structured as oxs
from optax_structured.quantization import DynamicCode

SHAPES = {"dense": {"kernel": (16, 32)}, "bias": (32,)}


def params(dtype=jnp.float32):
    return normal_tree("params", SHAPES, dtype)


# Effects


def logger(log, ordered=True):
    """Passes updates through, and tells the host about each leaf and each step."""

    def init(params):
        return optax.EmptyState()

    def update(updates, state, params=None):
        for leaf in jax.tree.leaves(updates):
            if ordered:
                io_callback(lambda x: log.append(float(x)), None, leaf.sum(), ordered=True)
            else:
                jax.debug.callback(lambda x: log.append(float(x)), leaf.sum())
        return updates, state

    return optax.GradientTransformation(init, update)


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "debug"])
@pytest.mark.parametrize("place", ["before", "after", "both"])
def test_callbacks_run_once_each_and_in_order(ordered, place):
    log, plain = [], []
    in_codes = functools.partial(oxs.quantized, min_size=1)
    for record, wrap in ((plain, lambda tx: tx), (log, in_codes)):
        told = logger(record, ordered)
        parts = {"before": (told, ADAM), "after": (ADAM, told), "both": (told, ADAM, told)}
        tx = wrap(optax.chain(*parts[place]))
        state = tx.init(params())
        update = jax.jit(tx.update)
        for step in range(2):
            updates, state = update(normal_tree(step, SHAPES), state)
            jax.block_until_ready(updates)
            jax.effects_barrier()
    in_order = (lambda x: x) if ordered else sorted
    np.testing.assert_allclose(in_order(log), in_order(plain), rtol=1e-2, atol=0.1)


ADAM = optax.scale_by_adam()


def test_a_value_from_the_host_is_asked_for_once():
    asked = []

    def rate(_):
        asked.append(None)
        return np.float32(0.5)

    def update(updates, state, params=None):
        factor = io_callback(rate, jax.ShapeDtypeStruct((), jnp.float32), 0.0, ordered=True)
        return jax.tree.map(lambda u: factor * u, updates), state

    scaled = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = oxs.quantized(optax.chain(scaled, optax.trace(0.9)), min_size=1)
    updates, _ = jax.jit(tx.update)(params(), tx.init(params()))
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, 0.5 * p, rtol=1e-6), updates, params())
    assert len(asked) == 1


def test_checks_reach_checkify():
    def update(updates, state, params=None):
        checkify.check(jnp.all(updates["bias"] > 0), "a gradient is negative")
        return updates, state

    checked = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = oxs.quantized(optax.chain(checked, ADAM), min_size=1)
    step = checkify.checkify(jax.jit(tx.update))
    ones = jax.tree.map(jnp.ones_like, params())
    error, _ = step(ones, tx.init(ones))
    error.throw()
    error, _ = step({**ones, "bias": -ones["bias"]}, tx.init(ones))
    with pytest.raises(checkify.JaxRuntimeError, match="a gradient is negative"):
        error.throw()


# Codes again


@pytest.mark.parametrize(
    "inner",
    [
        oxs.quantized(optax.adamw(1e-2), min_size=2),
        oxs.q_galore(1e-2, oxs.LowRank(8), moments=oxs.rules(default=oxs.Dynamic(block=2))),
    ],
    ids=["quantized", "q_galore"],
)
def test_codes_are_not_encoded_again(inner):
    large = {"kernel": jnp.ones((512, 512))}
    with pytest.raises(ValueError, match="is in codes already.*put quantized around it once"):
        oxs.quantized(inner).init(large)


@pytest.mark.slow
def test_moments_beside_codes_of_another_wrapper_are_encoded():
    """Bases in 4 bits and moments that q_galore keeps in float32."""
    inner = oxs.q_galore(1e-2, oxs.LowRank(8), moments=None, weights=None)
    tx = oxs.quantized(inner, min_size=64)
    grads = [normal_tree(i, SHAPES) for i in range(3)]
    got, state = run(tx, params(), grads)
    expected, _ = run(inner, params(), grads)
    moved = got["dense"]["kernel"] - params()["dense"]["kernel"]
    plain = expected["dense"]["kernel"] - params()["dense"]["kernel"]
    assert np.linalg.norm(moved - plain) <= 0.1 * np.linalg.norm(plain)
    codes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, tuple(CODES)))
    assert {type(x) for x in codes} >= CODES


CODES = {DynamicCode, oxs.quantization.AffineCode}


# Another setting than that of the state


BEFORE = oxs.Dynamic(8, block=64)
CHANGES = {
    "block": (oxs.Dynamic(8, block=16), r"8 bits of shape \(16, 32\) in blocks of 16"),
    "bits": (oxs.Dynamic(4, block=64), "4 bits in blocks of 64"),
    "none": (None, r"float32 of shape \(16, 32\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("back", [False, True], ids=["to", "from"])
def test_another_codec_than_that_of_the_state_is_explained(change, back):
    codec, told = CHANGES[change]
    made, used = (codec, BEFORE) if back else (BEFORE, codec)
    optimizers = [
        oxs.quantized(optax.adam(1e-2), oxs.rules(("kernel", c), default=BEFORE), min_size=64)
        for c in (made, used)
    ]
    told = told if not back else r"8 bits of shape \(16, 32\) in blocks of 64"
    message = rf"quantized: the state of 'dense/kernel' was made for .*, .* optimizer has {told}"
    state = optimizers[0].init(params())
    with pytest.raises(ValueError, match=message + ".*oxs.reinit"):
        optimizers[1].update(params(), state, params())


def test_the_state_of_another_transformation_is_explained():
    state = oxs.quantized(optax.lion(1e-2), min_size=2).init(params())
    with pytest.raises(ValueError, match="another transformation or to other parameters"):
        oxs.quantized(optax.adam(1e-2), min_size=2).update(params(), state, params())


# Dtypes


@pytest.mark.slow
@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("grads", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("min_size", [2, 64], ids=["all", "large"])
def test_updates_are_as_wide_as_the_weights_and_the_state_keeps_its_types(weights, grads, min_size):
    tx = oxs.quantized(optax.adam(1e-2), min_size=min_size)
    state = tx.init(params(weights))
    updates, new = jax.jit(tx.update)(params(grads), state, params(weights))
    wide = jnp.promote_types(weights, jnp.float32)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {wide}
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


def test_small_gradients_in_half_precision_are_squared_in_float32():
    """1e-4 squared is zero in float16."""
    tx = oxs.quantized(optax.scale_by_adam(), min_size=2)
    weights = {"w": jnp.ones(64)}
    grads = {"w": jnp.full(64, 1e-4, jnp.float16)}
    updates, _ = tx.update(grads, tx.init(weights), weights)
    np.testing.assert_allclose(updates["w"], 1.0, rtol=1e-3)


def test_complex_moments_name_the_wrapper_that_splits_them():
    weights = {"w": jnp.ones((8, 8), jnp.complex64)}
    with pytest.raises(ValueError, match=r"mu is complex64.*split_real_and_imaginary\(inner\)"):
        oxs.quantized(optax.adam(1e-2), min_size=2).init(weights)
    tx = oxs.quantized(optax.contrib.split_real_and_imaginary(optax.adam(1e-2)), min_size=2)
    grads = {"w": weights["w"] * (1 + 2j)}
    updates, _ = tx.update(grads, tx.init(weights), weights)
    np.testing.assert_allclose(updates["w"], -0.01 * (1 + 1j) * np.ones((8, 8)), rtol=1e-3)


CODECS = [oxs.Dynamic(), oxs.Dynamic(4), oxs.Dynamic(signed=False), oxs.Affine(), oxs.Affine(4)]


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_promoted_silently(codec, dtype):
    with jax.numpy_dtype_promotion("strict"):
        x = normal("x", (8, 32), dtype)
        assert codec.decode(codec.encode(x), x.shape).dtype == jnp.float32
        if isinstance(codec, oxs.Affine):
            weights = oxs.apply_updates(
                oxs.weights.quantize_weights({"w": x}, codec), {"w": x}, jax.random.key(0)
            )
            assert oxs.weights.merge(weights)["w"].dtype == jnp.float32


# Dual averaging


def test_dual_averaging_keeps_its_structure_with_sums_of_squares_in_codes():
    """Three quarters of the bytes: sums of gradients and the point of departure stay wide."""
    recipe = functools.partial(oxs.ramda, 0.1, oxs.GroupLasso(-1), momentum=0.0)
    plain = recipe(0.1)
    stored = oxs.quantized(plain, min_size=64)
    start = {"w": 0.1 * normal("start", (32, 16))}
    truth = normal("truth", (32, 16)) * (jnp.arange(16) < 5)
    inputs = normal("inputs", (64, 32))

    @functools.partial(jax.jit, static_argnums=0)
    def trained(tx):
        def body(carry, _):
            params, state = carry
            grads = {"w": inputs.T @ (inputs @ (params["w"] - truth)) / 64}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (start, tx.init(start)), length=200)[0][0]["w"]

    expected, got = trained(plain), trained(stored)
    zeros = jnp.all(expected == 0, 0)
    assert 5 <= int(zeros.sum()) < 16
    np.testing.assert_array_equal(jnp.all(got == 0, 0), zeros)
    assert jnp.linalg.norm(got - expected) <= 0.02 * jnp.linalg.norm(expected)
    assert oxs.state_bytes(stored, start) < 0.76 * oxs.state_bytes(plain, start)
