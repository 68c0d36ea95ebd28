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

from optax_structured.step_sizes import ponos, scale_by_ponos, zhang_hager_reference

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
    """5/L, 2.5/L, 1.25/L, 0.625/L; the next search starts two backtracks lower and succeeds."""
    search, w = scale_by_ponos(), jnp.array([3.0, 4.0])
    w, state = search_once(search, search.init(w), w)
    assert (state.num_backtracks, state.memory) == (3, 2)
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


@pytest.mark.slow
def test_eight_devices_take_the_decisions_of_one():
    X = jax.random.normal(jax.random.key(2), (16, 3))
    y = X @ jnp.array([1.0, -2.0, 0.5])
    optimizer = ponos()
    step = step_of(optimizer, lambda w, X, y: jnp.mean((X @ w - y) ** 2))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("data"))
    w = jnp.zeros(3)
    runs = []
    for batch in ((X, y), jax.device_put((X, y), spread)):
        params, state = w, optimizer.init(w)
        taken = []
        for _ in range(3):
            params, state = step(params, state, *batch)
            taken.append((int(state[-1].num_backtracks), float(state[-1].learning_rate)))
        runs.append((taken, params))
    assert [n for n, _ in runs[0][0]] == [n for n, _ in runs[1][0]]
    assert_close(runs[1][1], runs[0][1], 1e-4)


def test_vmap_searches_each_member():
    search = scale_by_ponos()
    ws = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    states = jax.vmap(search.init)(ws)
    after, states = jax.vmap(lambda w, s: search_once(search, s, w))(ws, states)
    assert states.num_backtracks.tolist() == [3, 0]
    np.testing.assert_array_equal(after[1], 0)
