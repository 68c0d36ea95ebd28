"""PoNoS: the published runs trial by trial, and what the search does by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import LINE_SEARCH, ROUNDING, assert_close

from optax_structured.step_sizes import (
    polyak_initial_step,
    ponos,
    scale_by_ponos,
    zhang_hager_reference,
)

SETTINGS = {
    "c": "c",
    "c_p": "c_p",
    "delta": "decrease_factor",
    "zhang_xi": "xi",
    "max_eta": "max_learning_rate",
    "min_eta": "min_learning_rate",
    "f_star": "f_star",
    "save_backtracks": "memory",
}


def problem(leaves):
    """The loss that files with these leaves are of: logistic regression, or an MLP of one layer."""
    if set(leaves) == {"w", "b"}:
        return lambda p, X, y: optax.sigmoid_binary_cross_entropy(X @ p["w"] + p["b"], y).mean()
    w1, b1, w2, b2 = leaves
    return lambda p, X, y: jnp.mean((jnp.tanh(X @ p[w1] + p[b1]) @ p[w2] + p[b2] - y) ** 2)


def step_of(optimizer, loss):
    @jax.jit
    def step(params, state, X, y):
        value, grad = jax.value_and_grad(loss)(params, X, y)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, X=X, y=y
        )
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("ponos-"))
def test_golden(name):
    golden = load(name)
    optimizer = ponos(**{SETTINGS[key]: value for key, value in golden.meta["hyper"].items()})
    step = step_of(optimizer, problem(golden.meta["leaves"]))
    params = jax.tree.map(jnp.asarray, golden.start)
    state = optimizer.init(params)
    X, y = (jnp.asarray(golden.arrays[f"data/{key}"]) for key in "Xy")
    batches = golden.arrays.get("batches", np.arange(len(y))[None])
    scalars = golden.leaves("scalar")
    for t in range(golden.meta["steps"]):
        rows = batches[t % len(batches)]
        params, state = step(params, state, X[rows], y[rows])
        search = state[-1]
        assert search.num_backtracks + 1 == scalars["n_trials"][t], t
        assert search.num_trials <= scalars["n_trials"][t], t
        assert search.memory == scalars["lk_after"][t], t
        found = (search.learning_rate, search.average, search.weight, search.value)
        recorded = [scalars[key][t] for key in ("step", "C", "Q", "loss_next")]
        np.testing.assert_allclose(found, recorded, rtol=LINE_SEARCH, err_msg=f"step {t}")
        for leaf, published in golden.leaves("params").items():
            assert_close(params[leaf], published[t], LINE_SEARCH)


def square(w):
    return 0.5 * jnp.sum(w**2)


def search_once(search, state, w, loss=square, **changes):
    """One step, compiled as a whole: `loss` is what trials see."""
    return jax.jit(lambda state, w: _search(search, state, w, loss, changes))(state, w)


def _search(search, state, w, loss, changes):
    value, grad = jax.value_and_grad(square)(w)
    arguments = {"value": value, "grad": grad, "value_fn": loss} | changes
    updates, state = search.update(-grad, state, w, **arguments)
    return optax.apply_updates(w, updates), state


def test_quadratic_from_polyak_start():
    """5/L, 2.5/L, 1.25/L, 0.625/L; the next search starts two backtracks lower and succeeds.

    Only a loss below 0 could pass the first three trials: none is evaluated.
    """
    search, w, seen = scale_by_ponos(), jnp.array([3.0, 4.0]), []

    def counted(w):
        jax.debug.callback(lambda: seen.append(1))
        return square(w)

    w, state = search_once(search, search.init(w), w, counted)
    jax.effects_barrier()
    assert (state.num_backtracks, state.memory) == (3, 2)
    assert len(seen) == state.num_trials == 1
    assert_close(state.learning_rate, 0.625, ROUNDING["float32"])
    w, state = search_once(search, state, w)
    assert (state.num_backtracks, state.memory) == (0, 1)
    assert_close(state.learning_rate, 1.25, ROUNDING["float32"])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_monotone_without_memory_is_backtracking():
    X = jax.random.normal(jax.random.key(0), (12, 3))
    loss = lambda w: jnp.mean(jnp.logaddexp(0.0, X @ w))  # noqa: E731
    ours = ponos(c=0.4, c_p=1e-6, decrease_factor=0.7, xi=0.0, max_learning_rate=50.0, memory=False)
    theirs = optax.chain(
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(
            100, slope_rtol=0.4, decrease_factor=0.7, increase_factor=np.inf, max_learning_rate=50.0
        ),
    )
    found = []
    for tx in (ours, theirs):
        w = jnp.ones(3)
        state = tx.init(w)
        for _ in range(4):
            value, grad = jax.value_and_grad(loss)(w)
            updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=loss)
            w = optax.apply_updates(w, updates)
            found.append(float(optax.tree.get(state, "learning_rate")))
    assert_close(found[:4], found[4:], 1e-12)
    assert len(set(found)) > 1


@pytest.mark.parametrize("xi", [0.0, 0.5, 1.0])
def test_reference_is_a_weighted_mean(xi):
    losses, average, weight = [3.0, 1.0, 8.0, 2.0], 0.0, 0.0
    for loss in losses:
        average, weight = zhang_hager_reference(average, weight, loss, xi)
    weights = xi ** np.arange(4)[::-1]
    np.testing.assert_allclose(
        [average, weight], [np.average(losses, weights=weights), weights.sum()]
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_trial_that_is_not_finite_fails(bad):
    search, w = scale_by_ponos(), jnp.array([3.0, 4.0])
    cliff = lambda w: jnp.where(jnp.abs(w[0]) < 2.5, square(w), bad)  # noqa: E731
    w, state = search_once(search, search.init(w), w, cliff)
    assert jnp.isfinite(state.value)
    assert abs(w[0]) < 2.5


@pytest.mark.parametrize("change", [{"value": jnp.nan}, {"grad": jnp.array([jnp.nan, 1.0])}])
def test_a_step_that_is_not_finite_changes_nothing(change):
    search, w = scale_by_ponos(), jnp.array([3.0, 4.0])
    w, state = search_once(search, search.init(w), w)
    after, new = search_once(search, state, w, **change)
    np.testing.assert_array_equal(after, w)
    assert (new.average, new.weight, new.memory) == (state.average, state.weight, state.memory)


def test_after_the_last_trial_the_step_is_tiny():
    search, w = scale_by_ponos(max_backtracks=5), jnp.array([3.0, 4.0])
    _, state = search_once(search, search.init(w), w, lambda w: jnp.sum(w) * 0 + 1e9)
    assert state.learning_rate == jnp.float32(1e-6)
    assert (state.num_backtracks, state.memory) == (4, 3)


@pytest.mark.parametrize("w", [jnp.zeros(2), jnp.full(2, 1e-9)])
def test_no_step_where_the_loss_or_its_gradient_is_zero(w):
    search = scale_by_ponos()
    after, state = search_once(search, search.init(w), w)
    np.testing.assert_array_equal(after, w)
    assert (state.weight, state.memory, state.learning_rate) == (1, 0, 0)


@pytest.mark.usefixtures("x64")
def test_backtracks_are_at_most_one_a_step_on_average():
    X = jax.random.normal(jax.random.key(1), (40, 4))
    y = X @ jnp.array([1.0, -2.0, 0.5, 3.0])
    optimizer = ponos()
    step = step_of(optimizer, lambda w, X, y: jnp.mean((X @ w - y) ** 2))

    def body(carry, rows):
        params, state = step(*carry, X[rows], y[rows])
        return (params, state), state[-1].num_backtracks

    w = jnp.zeros(4)
    rows = jnp.arange(120).reshape(-1, 4) % 40
    (w, state), backtracks = jax.lax.scan(body, (w, optimizer.init(w)), rows)
    assert sum(backtracks) <= len(rows) + state[-1].memory
    assert jnp.mean((X @ w - y) ** 2) < 1


def test_stored_gradient_is_that_of_the_accepted_point():
    search = scale_by_ponos(store_grad=True)
    w = jnp.array([3.0, 4.0])
    w, state = search_once(search, search.init(w), w)
    value, grad = optax.value_and_grad_from_state(square)(w, state=state)
    np.testing.assert_allclose(grad, w, rtol=1e-6)
    np.testing.assert_allclose(value, square(w), rtol=1e-6)


def test_adam_direction_decreases_along_its_slope():
    optimizer = ponos(optax.scale_by_adam(), c=0.1, decrease_factor=0.9, memory=False)
    w = jnp.array([3.0, 4.0])
    value, grad = jax.value_and_grad(square)(w)
    updates, state = optimizer.update(
        grad, optimizer.init(w), w, value=value, grad=grad, value_fn=square
    )
    rate = state[-1].learning_rate
    np.testing.assert_allclose(updates, -rate * jnp.ones(2), rtol=1e-5)
    assert square(w + updates) <= value - 0.1 * rate * jnp.sum(grad)


def test_a_loss_below_the_smallest_one_is_evaluated_as_ever():
    """The start is the least step then, and what a trial could reach is not known."""
    search, w = scale_by_ponos(min_learning_rate=0.5), jnp.array([3.0, 4.0])
    value, grad = jax.value_and_grad(square)(w)
    updates, state = search.update(
        -grad, search.init(w), w, value=value - 50, grad=grad, value_fn=lambda w: square(w) - 50
    )
    assert (state.num_backtracks, state.num_trials) == (0, 1)
    assert_close(updates, -0.5 * w, ROUNDING["float32"])


def test_a_loss_with_a_floor_is_searched_as_the_one_without():
    start = lambda f_star: polyak_initial_step(3.0, 2.0, 0.5, f_star)  # noqa: E731
    np.testing.assert_allclose([start(x) for x in (0.0, 2.0, 4.0)], [3.0, 1.0, 0.0], rtol=1e-6)
    search, w = scale_by_ponos(f_star=10.0), jnp.array([3.0, 4.0])
    raised = {"value": square(w) + 10, "value_fn": lambda w: square(w) + 10}
    w, state = search_once(search, search.init(w), w, **raised)
    assert (state.num_backtracks, state.num_trials) == (3, 1)
    assert_close(state.learning_rate, 0.625, ROUNDING["float32"])


def test_a_decrease_below_rounding_passes():
    """4 roundings of the reference, 2^-21 here: at c = 1 the step has to be halved once."""
    w, grad = jnp.zeros(1), jnp.full(1, 2.0**-10)
    for c, backtracks in ((0.25, 0), (1.0, 1)):
        search = scale_by_ponos(c=c, max_learning_rate=1.0)
        _, state = search.update(
            -grad, search.init(w), w, value=1.0, grad=grad, value_fn=lambda w: jnp.ones(())
        )
        assert state.num_backtracks == backtracks


def test_another_measure_of_the_decrease_takes_the_place_of_the_slope():
    measure = lambda updates, grad: 4 * jnp.sum(grad**2)  # noqa: E731
    search, w = scale_by_ponos(sufficient_decrease=measure, c=0.05), jnp.array([3.0, 4.0])
    w, state = search_once(search, search.init(w), w)
    assert_close(state.learning_rate, 1.25, ROUNDING["float32"])  # 12.5 / (0.1 * 4 * 25)
    assert state.num_backtracks == 0


def in_a_loop(step, w, state, batches):
    searches = []
    for batch in batches:
        w, state = step(w, state, *batch)
        searches.append(state[-1])
    return w, jax.tree.map(lambda *x: jnp.stack(x), *searches)


def test_the_same_decisions_without_jit_in_a_scan_and_on_eight_devices():
    X = jax.random.normal(jax.random.key(2), (3, 16, 3))
    y = X @ jnp.array([1.0, -2.0, 0.5])
    optimizer, w = ponos(), jnp.zeros(3)
    step = step_of(optimizer, lambda w, X, y: jnp.mean((X @ w - y) ** 2))
    start = optimizer.init(w)
    spread = NamedSharding(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)), P(None, "d"))

    def body(carry, batch):
        carry = step(*carry, *batch)
        return carry, carry[1][-1]

    scanned, searches = jax.jit(lambda w: jax.lax.scan(body, (w, start), (X, y)))(w)
    runs = {
        "scan": (scanned[0], searches),
        "jit": in_a_loop(step, w, start, zip(X, y, strict=True)),
        "devices": in_a_loop(step, w, start, zip(*jax.device_put((X, y), spread), strict=True)),
    }
    with jax.disable_jit():
        runs["no jit"] = in_a_loop(step, w, start, zip(X, y, strict=True))
    for way, (end, found) in runs.items():
        for field in ("num_backtracks", "num_trials", "memory"):
            taken, expected = getattr(found, field).tolist(), getattr(searches, field).tolist()
            assert taken == expected, (way, field)
        assert_close(found.learning_rate, searches.learning_rate, 1e-5)
        assert_close(end, scanned[0], 1e-4)


def test_vmap_searches_each_member():
    search = scale_by_ponos()
    ws = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    states = jax.vmap(search.init)(ws)
    after, states = jax.vmap(lambda w, s: search_once(search, s, w))(ws, states)
    assert states.num_backtracks.tolist() == [3, 0]
    np.testing.assert_array_equal(after[1], 0)


def updated(**changes):
    w = jnp.array([3.0, 4.0])
    arguments = {"params": w, "value": 12.5, "grad": w, "value_fn": square} | changes
    search = scale_by_ponos()
    return lambda: search.update(-w, search.init(w), **arguments)


MISSING = "evaluates the loss of the current batch: call update.*value_fn=loss"
MISUSE = {
    "c": (lambda: scale_by_ponos(c=1.5), r"c must be in \[0, 1\]"),
    "c_p": (lambda: scale_by_ponos(c_p=0.0), "c_p must be a finite number above 0"),
    "xi": (lambda: scale_by_ponos(xi=-0.1), r"xi must be in \[0, 1\]"),
    "factor": (lambda: ponos(decrease_factor=2.0), r"decrease_factor must be in \[0, 1\]"),
    "trials": (lambda: ponos(max_backtracks=0), "max_backtracks must be a whole number above 0"),
    "measure": (lambda: ponos(sufficient_decrease="norm"), "must be 'slope' or a function"),
    "value": (updated(value=None), MISSING),
    "grad": (updated(grad=None), MISSING),
    "value_fn": (updated(value_fn=None), MISSING),
    "vector": (updated(value=jnp.ones(2)), r"value must be a scalar loss, got shape \(2,\)"),
    "params": (updated(params=None), "needs the current parameters"),
    "tree": (updated(grad={"w": jnp.ones(2)}), "another tree than that of the parameters"),
    "complex": (lambda: ponos().init(jnp.ones(2, complex)), "make two real leaves of it, which"),
}


@pytest.mark.parametrize("make, message", MISUSE.values(), ids=MISUSE)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
