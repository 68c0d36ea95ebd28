"""A strength that feedback drives to a wanted share of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structured as oxs
from optax_structured.proximal import ProxStepState

GROUPS = oxs.GroupLasso(group_axis=0, weight=1.0)
# Entries and norms of groups are 1 to 40: with a strength between 30 and 31 ten of them are left.
SIGNS = np.random.default_rng(0).choice([-1.0, 1.0], 40)
SIZES = jnp.asarray(np.random.default_rng(1).permutation(np.arange(1.0, 41.0)), jnp.float32)
LEAVES = {"entries": SIZES * SIGNS, "groups": SIZES[:, None] * jnp.array([[0.6, -0.8]])}
RULES = oxs.rules(("entries", oxs.L1()), default=GROUPS)

OPTIMIZERS = {
    "ramda": lambda s: oxs.ramda(1.0, RULES, s, momentum=0.5),
    "rmda": lambda s: oxs.rmda(1.0, RULES, s),
    "prox_sgd": lambda s: oxs.prox_sgd(0.1, RULES, s),
    "prox_adam": lambda s: oxs.prox_adam(1.0, RULES, s),
    "prox_step": lambda s: optax.chain(optax.sgd(0.1), oxs.prox_step(RULES, s, weight=0.1)),
}


def found(state):
    is_last = lambda x: isinstance(x, ProxStepState)  # noqa: E731
    return next(filter(is_last, jax.tree.leaves(state, is_leaf=is_last)))


def train(optimizer, steps, params=None, state=None):
    """Half the squared distance to `LEAVES`, of which the zeros are known at any strength."""
    params = jax.tree.map(jnp.zeros_like, LEAVES) if params is None else params
    state = optimizer.init(params) if state is None else state

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(jnp.subtract, params, LEAVES), state, params)
        last = found(state)
        return (optax.apply_updates(params, updates), state), (last.strength, last.zeros)

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, state), (strengths, zeros) = run((params, state))
    return params, state, strengths, zeros


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_strength_goes_to_where_the_share_is_zero(name):
    target = oxs.TargetSparsity(0.75, start=1e-3)
    params, state, strengths, zeros = train(OPTIMIZERS[name](target), 3000)
    # Steps of `rmda` differ by some groups, and which of them is the last hangs on rounding.
    assert abs(float(jnp.mean(zeros[-200:])) - 0.75) < 0.06
    assert 25 < strengths[-1] < 32  # of 40 sizes the ten above 30 are left
    assert abs(float(strengths[-1] / strengths[-200]) - 1) < 0.02  # it has settled
    if name not in ("ramda", "rmda"):  # of which the prox point has the zeros
        dead = [jnp.mean(x == 0.0) for x in jax.tree.leaves(params)]
        assert abs(float(sum(dead)) / 2 - 0.75) < 0.08


@pytest.mark.slow
def test_it_goes_on_through_restarts_and_checkpoints():
    target = oxs.TargetSparsity(0.5, start=1e-3)
    restarted = oxs.restart_at(OPTIMIZERS["ramda"](target), (50,))
    params, state, strengths, _ = train(restarted, 100)
    steps = jnp.abs(jnp.diff(jnp.log(strengths)))
    assert strengths[0] == jnp.float32(1e-3) and jnp.max(steps) <= 0.1
    assert strengths[60] > strengths[49] > 2 * strengths[0]
    again = train(restarted, 20, params, jax.tree.map(jnp.asarray, jax.device_get(state)))
    whole = train(restarted, 120)
    jax.tree.map(np.testing.assert_array_equal, again[:2], whole[:2])


def test_a_plain_number_has_the_same_state_and_takes_over():
    found_one = OPTIMIZERS["prox_sgd"](oxs.TargetSparsity(0.5, gain=0.05))
    params, state, strengths, _ = train(found_one, 300)
    plain = OPTIMIZERS["prox_sgd"](float(strengths[-1]))
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(state)
    _, state, later, _ = train(plain, 10, params, state)
    np.testing.assert_allclose(later, strengths[-1])


def test_hyperparameters_are_injected_around_it():
    make = optax.inject_hyperparams(oxs.ramda)
    optimizer = make(lambda count: 1.0 + 0 * count, RULES, oxs.TargetSparsity(0.5), momentum=0.5)
    _, state, strengths, _ = train(optimizer, 20)
    assert "strength" not in state.hyperparams and strengths[-1] > strengths[0]
    plain = oxs.ramda(1.0, RULES, oxs.TargetSparsity(0.5), momentum=0.5)
    np.testing.assert_allclose(strengths, train(plain, 20)[2], rtol=1e-5)


def test_sharded_leaves_count_as_one():
    optimizer = OPTIMIZERS["prox_adam"](oxs.TargetSparsity(0.75, start=20.0))
    expected = train(optimizer, 20)[2]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        put = lambda x: jax.device_put(jnp.zeros_like(x), sharding)  # noqa: E731
        optimizer = OPTIMIZERS["prox_adam"](oxs.TargetSparsity(0.75, start=20.0))
        params = jax.tree.map(put, LEAVES)
        state = optimizer.init(params)
        targets = jax.tree.map(lambda x: jax.device_put(x, sharding), LEAVES)

        @jax.jit
        def step(params, state):
            gradient = jax.tree.map(jnp.subtract, params, targets)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(20):
            params, state = step(params, state)
    assert 0 < found(state).zeros < 1
    np.testing.assert_allclose(found(state).strength, expected[-1], rtol=1e-5)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: oxs.TargetSparsity(1.0), "share must lie between 0 and 1, got 1.0"),
        (lambda: oxs.TargetSparsity(0.5, start=0.0), "start must be a finite number above 0"),
        (lambda: oxs.TargetSparsity(0.5, gain=-1.0), "gain must be a finite number above 0"),
        (lambda: oxs.ramda(1.0, None, oxs.TargetSparsity(0.5)), "no regularizer that it could be"),
        (
            lambda: oxs.prox_sgd(1.0, oxs.Box(), oxs.TargetSparsity(0.5)).init(LEAVES),
            "no leaf has a penalty whose zeros depend on a strength",
        ),
    ],
)
def test_mistakes_are_sentences(make, says):
    with pytest.raises(ValueError, match=says):
        make()
