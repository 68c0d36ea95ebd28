"""Limiting cases and invariances of the recipes, exact in exact arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from recipes_table import assert_close, assert_equal, normal, run
from tolerances import FLOAT32_COUNTERS, LIMIT, reordered

import optax_structured as oxs

pytestmark = pytest.mark.usefixtures("x64")

EXACT = reordered(jnp.float64)
SHAPE = (6, 5)
GROUPS = oxs.GroupLasso(group_axis=0)
STEPS = 8


def start():
    return normal("w", SHAPE, jnp.float64)


def gradients(steps=STEPS):
    return [normal(("g", t), SHAPE, jnp.float64) for t in range(steps)]


def after(tx, grads=None, w=None):
    return run(tx, start() if w is None else w, gradients() if grads is None else grads)[0]


# Without regularizer


def test_ramda_is_madgrad():
    rate, momentum, eps = 0.03, 0.9, 1e-3
    w0 = w = np.asarray(start())
    s, u = np.zeros(SHAPE), np.zeros(SHAPE)
    for k, g in enumerate(map(np.asarray, gradients())):
        step = (rate - eps + eps) * np.sqrt(k + 1)  # MADGRAD adds eps to its learning rate
        s, u = s + step * g, u + step * g * g
        w = momentum * w + (1 - momentum) * (w0 - s / (np.cbrt(u) + eps))
    got = after(oxs.ramda(rate, momentum=momentum, eps=eps))
    assert_close(got, w, EXACT)
    assert_close(after(oxs.ramda(rate, GROUPS, 0.0, momentum=momentum, eps=eps)), w, EXACT)
    optax_madgrad = optax.contrib.madgrad(rate - eps, momentum=momentum, eps=eps)
    assert_close(
        got, after(optax_madgrad), FLOAT32_COUNTERS
    )  # it takes the root of its counter in float32


def test_ramda_without_regularizer_is_madgrad():
    rate, momentum, eps = 0.03, 0.9, 1e-3
    expected = after(oxs.ramda(rate, momentum=momentum, eps=eps))
    assert_close(after(oxs.madgrad(rate - eps, momentum=momentum, eps=eps)), expected, EXACT)


@pytest.mark.parametrize("make", [oxs.madgrad, oxs.mirror_madgrad])
@pytest.mark.parametrize("rate", [0.0, lambda count: jnp.zeros(())], ids=["number", "schedule"])
def test_madgrad_at_a_rate_of_zero_stays(make, rate):
    assert_equal(after(make(rate, eps=1e-2, weight_decay=0.1)), start())


def test_primal_averaging_of_sgd_is_heavy_ball_momentum():
    momentum = 0.75
    expected = after(optax.sgd(0.1 * (1 - momentum), momentum))
    assert_close(after(oxs.transforms.primal_averaging(optax.sgd(0.1), momentum)), expected, EXACT)
    assert_close(
        after(oxs.transforms.primal_averaging(optax.adam(0.1), 0.0)), after(optax.adam(0.1)), EXACT
    )


def test_first_step_of_ramda():
    rate, eps = 0.03, 1e-2
    (g,) = gradients(1)
    expected = start() - rate * g / (rate ** (1 / 3) * jnp.abs(g) ** (2 / 3) + eps)
    assert_close(after(oxs.ramda(rate, momentum=0.0, eps=eps), [g]), expected, EXACT)


def test_rmda_is_modernized_dual_averaging():
    rate = 0.03
    weighted = sum(np.sqrt(k + 1) * g for k, g in enumerate(gradients()))
    expected = start() - rate / np.sqrt(STEPS) * weighted
    assert_close(after(oxs.rmda(rate, momentum=0.0)), expected, EXACT)


def test_rmda_follows_a_constant_gradient():
    (g,) = gradients(1)
    direction = (after(oxs.rmda(0.1, momentum=0.0), [g] * STEPS) - start()) / g
    assert_close(direction, jnp.broadcast_to(direction[0, 0], SHAPE), 10 * EXACT)
    assert direction[0, 0] < 0


def test_prox_sgd_is_sgd_on_the_moving_average():
    expected = optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.1))
    assert_close(after(oxs.prox_sgd(0.1, momentum=0.9)), after(expected), EXACT)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_prox_adam_is_adamw(weight_decay):
    expected = optax.adamw(0.05, b2=0.99, weight_decay=weight_decay)
    got = oxs.prox_adam(0.05, b2=0.99, weight_decay=weight_decay)
    # The powers of the decay rates in optax's correction of bias are those of float32 counters.
    assert_close(after(got), after(expected), FLOAT32_COUNTERS)


def test_prox_adam_amsgrad_keeps_the_largest_mean_square():
    rate, b1, b2, eps = 0.05, 0.9, 0.99, 1e-8
    w = np.asarray(start())
    m, v, v_max = np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE)
    for t, g in enumerate(map(np.asarray, gradients()), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        v_max = np.maximum(v_max, v)
        w = w - rate * m / (1 - b1**t) / (np.sqrt(v_max / (1 - b2**t)) + eps)
    assert_close(after(oxs.prox_adam(rate, b1=b1, b2=b2, eps=eps, amsgrad=True)), w, EXACT)


def test_prox_ssi_is_adam_with_eps_in_the_uncorrected_root():
    rate, b1, b2, eps, decay = 0.05, 0.9, 0.99, 1e-3, 0.1
    w = np.asarray(start())
    m, v = np.zeros(SHAPE), np.zeros(SHAPE)
    for t, g in enumerate(map(np.asarray, gradients()), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        size = rate * np.sqrt(1 - b2**t) / (1 - b1**t)
        w = (w - size * m / (np.sqrt(v) + eps)) * (1 - rate * decay)
    got = oxs.prox_ssi(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    assert_close(after(got), w, EXACT)


@pytest.mark.parametrize(
    "make",
    [
        oxs.ramda,
        oxs.rmda,
        oxs.prox_sgd,
        oxs.prox_adam,
        oxs.prox_ssi,
        oxs.madgrad,
        oxs.mirror_madgrad,
    ],
)
def test_no_gradient_no_movement(make):
    assert_equal(after(make(0.1), [jnp.zeros(SHAPE)] * 3), start())


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1e-38, 1e-30, 1e-20, 1e-6])
@pytest.mark.parametrize("make", [oxs.ramda, oxs.prox_adam])
@pytest.mark.parametrize("regularizer", [GROUPS, oxs.L1()], ids=repr)
def test_a_rate_that_starts_at_zero_moves_nothing_at_first(make, regularizer, eps):
    """The metric is then eps alone, also where a whole group is zero."""
    w = start().astype("float32").at[0].set(0.0)
    tx = make(lambda count: 0.1 * jnp.minimum(count, 1), regularizer, 1e-3, eps=eps)
    state = tx.init(w)
    for step in range(2):
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        assert jnp.all(jnp.isfinite(updates))
        if step == 0:
            np.testing.assert_allclose(updates, 0, atol=1e-6)


# Units


def rescaled(a):
    return [a * g for g in gradients()]


@pytest.mark.slow
@pytest.mark.parametrize("a", [4.0, 1e3, 1e-3])
def test_ramda_does_not_see_the_unit_of_the_loss(a):
    rate, strength, eps = 0.1, 0.2, 1e-4
    expected = after(oxs.ramda(rate, GROUPS, strength, momentum=0.5, eps=eps))
    tx = oxs.ramda(rate / a**0.5, GROUPS, a * strength, momentum=0.5, eps=eps * a**0.5)
    assert_close(after(tx, rescaled(a)), expected, 100 * EXACT)


@pytest.mark.parametrize("a", [4.0, 1e3, 1e-3])
def test_rmda_does_not_see_the_unit_of_the_loss(a):
    expected = after(oxs.rmda(0.1, GROUPS, 0.2, momentum=0.5))
    assert_close(
        after(oxs.rmda(0.1 / a, GROUPS, 0.2 * a, momentum=0.5), rescaled(a)), expected, 100 * EXACT
    )


@pytest.mark.slow
@pytest.mark.parametrize("a", [4.0, 1e3, 1e-3])
def test_prox_adam_does_not_see_the_unit_of_the_loss(a):
    expected = after(oxs.prox_adam(0.1, GROUPS, 0.2, eps=1e-6))
    tx = oxs.prox_adam(0.1, GROUPS, 0.2 * a, eps=1e-6 * a)
    assert_close(after(tx, rescaled(a)), expected, 100 * EXACT)


# Groups


RECIPES = {
    "ramda": lambda regularizer: oxs.ramda(0.1, regularizer, 0.3, momentum=0.0),
    "rmda": lambda regularizer: oxs.rmda(0.1, regularizer, 0.3, momentum=0.0),
    "prox_sgd": lambda regularizer: oxs.prox_sgd(0.1, regularizer, 0.3),
    "prox_adam": lambda regularizer: oxs.prox_adam(0.1, regularizer, 0.3),
    "prox_ssi": lambda regularizer: oxs.prox_ssi(0.1, regularizer, 0.3),
}
every_recipe = pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)


@pytest.mark.slow
@every_recipe
def test_groups_of_one_entry_are_soft_thresholding(make):
    column = lambda x: x.reshape(-1, 1)  # noqa: E731
    grads = [column(g) for g in gradients()]
    got = after(make(GROUPS), grads, column(start()))
    expected = after(make(oxs.L1()), grads, column(start()))
    assert_close(got, expected, 10 * EXACT)
    assert_equal(got == 0, expected == 0)
    assert jnp.any(got == 0)


@pytest.mark.slow
@every_recipe
def test_permutations_commute_with_the_run(make):
    rows, cols = np.random.default_rng(0).permutation(6), np.random.default_rng(1).permutation(5)
    shuffle = lambda x: x[rows][:, cols]  # noqa: E731
    got = after(make(GROUPS), [shuffle(g) for g in gradients()], shuffle(start()))
    assert_close(got, shuffle(after(make(GROUPS))), 10 * EXACT)


@pytest.mark.slow
@every_recipe
def test_axes_of_the_groups_are_only_names(make):
    transposed = after(make(oxs.GroupLasso(1)), [g.T for g in gradients()], start().T)
    assert_close(transposed.T, after(make(GROUPS)), 10 * EXACT)


@pytest.mark.slow
@every_recipe
def test_leaves_do_not_see_each_other(make):
    both = {"a": start(), "b": 2 * start()}
    grads = [{"a": g, "b": -g} for g in gradients()]
    got, _ = run(make(GROUPS), both, grads)
    assert_close(got["a"], after(make(GROUPS)), EXACT)


@pytest.mark.slow
@every_recipe
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_huge_strength_gives_exact_zeros(make, dtype):
    """In one step and in every dtype. A metric of eps alone would do it at any strength."""
    w = 100 * start().astype(dtype)
    tx = RECIPES_AT_STRENGTH[make](1e6)
    assert_equal(after(tx, [g.astype(dtype) for g in gradients(1)], w), jnp.zeros_like(w))


RECIPES_AT_STRENGTH = {
    RECIPES["ramda"]: lambda strength: oxs.ramda(0.1, GROUPS, strength, momentum=0.0),
    RECIPES["rmda"]: lambda strength: oxs.rmda(0.1, GROUPS, strength, momentum=0.0),
    RECIPES["prox_sgd"]: lambda strength: oxs.prox_sgd(0.1, GROUPS, strength),
    RECIPES["prox_adam"]: lambda strength: oxs.prox_adam(0.1, GROUPS, strength),
    RECIPES["prox_ssi"]: lambda strength: oxs.prox_ssi(0.1, GROUPS, strength),
}


def test_zero_test_of_ramda():
    """What_g = 0 iff the norm of (P W0 - V)_g is at most alpha lambda sqrt(n_g)."""
    strength = 1.0
    tx = oxs.ramda(0.1, GROUPS, strength)
    seen = set()
    for steps in range(1, STEPS):
        _, state = run(tx, start(), gradients(steps))
        dual, metric = state.inner_state[0], jnp.cbrt(state.inner_state[1].square_sum) + 1e-6
        norms = jnp.linalg.norm(metric * dual.anchor - dual.gradient_sum, axis=1)
        zero = norms <= dual.alpha * strength * np.sqrt(SHAPE[1])
        assert_equal(~GROUPS.support(oxs.prox_point(state, GROUPS)), zero)
        seen |= set(np.asarray(zero).tolist())
    assert seen == {True, False}


def test_dead_weights_of_live_groups_vanish():
    """Entries without any gradient have the metric eps: theta eps / (eps + tau / theta) ~ 0."""
    alive = np.ones(SHAPE)
    alive[:, 0] = 0.0
    got = after(oxs.ramda(0.1, GROUPS, 0.05, momentum=0.0), [g * alive for g in gradients()])
    assert jnp.any(GROUPS.support(got))
    assert jnp.max(jnp.abs(got[:, 0])) < 1e-3 * jnp.max(jnp.abs(got))


def test_zeros_of_the_average_come_once_momentum_is_zero():
    recipe = lambda momentum: oxs.ramda(0.1, GROUPS, 3.0, momentum=momentum)  # noqa: E731
    w, state = run(recipe(0.9), start(), gradients())
    assert not jnp.any(oxs.prox_point(state, GROUPS))
    assert jnp.all(w)
    to_zero = optax.piecewise_constant_schedule(0.9, {STEPS - 1: 0.0})
    assert not jnp.any(after(recipe(to_zero)))


def test_prox_ssi_without_concavity():
    """gamma to infinity: the group MCP is the group lasso."""
    concave = oxs.GroupMCP(0, threshold=1.0, gamma=1e12)
    make = RECIPES["prox_ssi"]
    assert_close(after(make(concave)), after(make(GROUPS)), LIMIT)


def test_prox_adam_in_a_constant_metric_is_prox_sgd():
    eps = 1e9
    adam = oxs.prox_adam(0.1 * eps, GROUPS, 0.3, b1=0.0, b2=0.0, eps=eps)
    assert_close(after(adam), after(oxs.prox_sgd(0.1, GROUPS, 0.3, momentum=0.0)), LIMIT)


# Parts


def test_recipes_are_chains_of_elements():
    by_hand = optax.chain(
        oxs.dual_averaging(0.1),
        oxs.adaptive_preconditioner(1e-6),
        oxs.prox_step(GROUPS, 0.3),
        optax.scale(0.5),
    )
    assert_equal(after(by_hand), after(oxs.ramda(0.1, GROUPS, 0.3, momentum=0.5)))


def test_prox_step_after_sgd_is_prox_sgd():
    by_hand = optax.chain(optax.sgd(0.1), oxs.prox_step(GROUPS, 0.3, weight=0.1))
    assert_close(after(by_hand), after(oxs.prox_sgd(0.1, GROUPS, 0.3, momentum=0.0)), EXACT)


def test_prox_step_without_regularizer_changes_nothing():
    assert_equal(after(optax.chain(optax.adam(0.1), oxs.prox_step())), after(optax.adam(0.1)))


@every_recipe
def test_box_is_never_left(make):
    w, grads, tx = start(), gradients(), make(oxs.Box(-0.5, 0.25))
    state = tx.init(w)
    for g in grads:
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        assert jnp.all((w >= -0.5 - 1e-15) & (w <= 0.25 + 1e-15))


@pytest.mark.slow
def test_restart_is_a_new_start_with_the_clock_of_the_old():
    stages = oxs.Stages((3, 5))
    recipe = oxs.ramda(
        stages.decay(0.1), GROUPS, 0.3, momentum=stages.momentum(0.9), eps=stages.decay(1e-4)
    )
    w = start()
    for first, last, rate, eps in ((0, 3, 0.1, 1e-4), (3, 5, 0.01, 1e-5), (5, 8, 0.001, 1e-6)):
        momentum = 0.9
        if last == STEPS:
            momentum = lambda i: 1 - jnp.minimum(0.1 * jnp.sqrt(i + 1.0), 1.0)  # noqa: E731
        w = after(
            oxs.ramda(rate, GROUPS, 0.3, momentum=momentum, eps=eps), gradients()[first:last], w
        )
    assert_close(after(oxs.restart_at(recipe, stages.milestones)), w, 100 * EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "long"),
    [
        (
            lambda s: oxs.ramda(0.1, GROUPS, 0.3, momentum=0.5, eps=1e-4, stages=s),
            lambda s: oxs.ramda(
                s.decay(0.1), GROUPS, 0.3, momentum=s.momentum(0.5), eps=s.decay(1e-4)
            ),
        ),
        (
            lambda s: oxs.rmda(0.1, GROUPS, 0.3, momentum=0.5, stages=s),
            lambda s: oxs.rmda(s.decay(0.1), GROUPS, 0.3, momentum=s.momentum(0.5)),
        ),
    ],
    ids=["ramda", "rmda"],
)
def test_stages_are_schedules_and_restarts(short, long):
    stages = oxs.Stages.equal(STEPS, 2)
    expected = after(oxs.restart_at(long(stages), stages.milestones))
    assert_equal(after(short(stages)), expected)


def test_one_call_ends_with_exact_zeros_in_the_parameters():
    """Least squares in which two of six groups matter, by the defaults."""
    target = start().at[2:].set(0.0)
    tx = oxs.ramda(0.1, GROUPS, 0.05, stages=oxs.Stages.equal(total_steps=300, number=2))

    def body(carry, _):
        w, state = carry
        updates, state = tx.update(w - target, state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, state), _ = jax.lax.scan(body, (start(), tx.init(start())), length=300)
    assert_equal(GROUPS.support(w), GROUPS.support(target))
    assert_close(oxs.prox_point(state, GROUPS), w, EXACT)


def test_restart_without_milestones_is_the_inner_recipe():
    recipe = oxs.ramda(0.1, GROUPS, 0.3)
    assert_equal(after(oxs.restart_at(recipe, ())), after(recipe))


def test_restart_of_any_optax_optimizer():
    got = after(oxs.restart_at(optax.adam(0.1), (4,)))
    expected = after(optax.adam(0.1), gradients()[4:], after(optax.adam(0.1), gradients()[:4]))
    assert_close(got, expected, EXACT)


def test_strength_does_not_depend_on_the_rate():
    """At the optimum of a convex problem the support is the same for every learning rate."""
    target = start()

    def support(rate):
        tx = oxs.rmda(rate, GROUPS, 0.4, momentum=0.0)

        def body(carry, _):
            w, state = carry
            updates, state = tx.update(w - target, state, w)
            return (optax.apply_updates(w, updates), state), None

        w0 = jnp.zeros(SHAPE)
        (w, _), _ = jax.lax.scan(body, (w0, tx.init(w0)), length=500)
        return GROUPS.support(w)

    expected = GROUPS.support(GROUPS.prox(target, 1.0, 0.4))
    for rate in (0.03, 0.1, 0.3):
        assert_equal(support(rate), expected)
