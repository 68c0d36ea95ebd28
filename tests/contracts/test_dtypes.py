"""Updates keep the dtype of the parameters; accumulators are float32 at least."""

import jax
import jax.numpy as jnp
import pytest
from recipes_table import (
    assert_close,
    every_case,
    gradients,
    jitted,
    params,
    run,
    step_of,
    types,
)
from tolerances import reordered

HALVES = ("float16", "bfloat16")
PAIRS = [(w, g) for w in (*HALVES, "float32") for g in (*HALVES, "float32")]
DTYPES = ("float16", "bfloat16", "float32", "float64")
DTYPES_OF_THEIR_OWN = {
    "ramda_keep_point": "the prox point is recorded in the dtype of the parameters",
    "galore_lazy_rotate": "similarities of subspaces are float32, whatever the parameters are",
    "q_galore_lazy": "the same",
    "gns": "optax reads the stored gradient in the dtype of the parameters",
    "gns_cg": "the same",
    "q_galore_lazy_on_grid": "the same",
}
ON_A_GRID = {
    "q_galore_lazy_on_grid": "no dtype below float32 holds the levels, and each has its own draws",
}

# No more than a number times what comes in.
AS_WIDE_AS_GRADIENTS = {"monitored_sgd"}
NARROW = AS_WIDE_AS_GRADIENTS | {"sgd_then_prox"}  # optax.sgd multiplies in their precision


@pytest.mark.usefixtures("x64")
@every_case
def test_dtype_is_kept(case):
    tx = case.build()
    for dtype in ("float32", "float64") if case.name in ON_A_GRID else DTYPES:
        start = params(dtype)
        state = jax.eval_shape(tx.init, start)
        new, new_state = jax.eval_shape(step_of(tx), gradients(0, dtype), state, start)
        assert types(new_state) == types(state), dtype
        assert types(new) == types(start), dtype


@every_case
def test_float16_is_finite(case):
    if case.name in ON_A_GRID:
        pytest.skip(ON_A_GRID[case.name])
    new, _ = run(case.build(), params("float16"), [gradients(0, "float16")])
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new))


@pytest.mark.usefixtures("x64")
@every_case
def test_accumulators_are_wide(case):
    if case.encoded:
        pytest.skip("scales of blocks are float32, whatever the parameters are")
    if case.name in DTYPES_OF_THEIR_OWN:
        pytest.skip(DTYPES_OF_THEIR_OWN[case.name])
    narrow, wide = (case.build().init(params(d)) for d in ("bfloat16", "float64"))
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    floats = lambda s: {x.dtype.name for x in jax.tree.leaves(s) if is_float(x)}  # noqa: E731
    assert floats(narrow) <= {"float32"}
    assert floats(wide) <= {"float64"}


@pytest.mark.usefixtures("x64")
@every_case
def test_low_precision_follows_high_precision(case):
    if case.name in ON_A_GRID:
        pytest.skip(ON_A_GRID[case.name])
    start, grads = params("bfloat16"), [gradients(i, "bfloat16") for i in range(3)]

    def ran_in(dtype):
        cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)  # noqa: E731
        return run(case.build(), cast(start), [cast(g) for g in grads])[0]

    expected = ran_in("float64")
    for dtype in ("bfloat16", "float32"):
        assert_close(ran_in(dtype), expected, 8 * reordered(dtype))


@pytest.mark.usefixtures("x64")
@every_case
def test_leaves_may_differ_in_dtype(case):
    if case.name in ON_A_GRID:
        pytest.skip(ON_A_GRID[case.name])
    start, grads = params(), gradients(0)
    for tree in (start, grads):
        tree["dense"]["kernel"] = tree["dense"]["kernel"].astype("bfloat16")
        tree["gain"] = tree["gain"].astype("float64")
    tx = case.build()
    state = tx.init(start)
    new, new_state = jitted(tx)(grads, state, start)
    assert types(new) == types(start)
    assert types(new_state) == types(state)


def small_steps(case):
    """A learning rate at which steps are lost in half precision."""
    return case.build(**{n: 1e-6 for n in case.scalars if n.endswith("learning_rate")})


@every_case
def test_updates_are_no_narrower_than_weights_or_gradients(case):
    tx = case.build()
    for weights, narrow in PAIRS:
        if weights in HALVES and case.name in ON_A_GRID:
            continue
        start = params(weights)
        state = jax.eval_shape(tx.init, start)
        updates, new = jax.eval_shape(tx.update, gradients(0, narrow), state, start)
        assert types(new) == types(state), (weights, narrow)
        least = jnp.promote_types(weights, narrow)
        if case.name in AS_WIDE_AS_GRADIENTS:
            least = jnp.dtype(narrow)
        for got in jax.tree.leaves(updates):
            assert jnp.promote_types(got.dtype, least) == got.dtype, (weights, narrow)


@every_case
def test_narrow_gradients_count_as_the_same_in_float32(case):
    if case.name in NARROW:
        pytest.skip("computes in the precision of what it is given")
    tx, start = small_steps(case), params("float32")
    state = exact = tx.init(start)
    update = jax.jit(tx.update)
    for i in range(2):
        grads = gradients(i, "bfloat16")
        updates, state = update(grads, state, start)
        widened = jax.tree.map(lambda g: g.astype("float32"), grads)
        expected, exact = update(widened, exact, start)
    for got, good in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert_close(got, good, 8 * reordered(got.dtype))
