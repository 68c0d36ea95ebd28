"""Friction and diffGrad: the published runs, and limiting cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load, names
from tolerances import GOLDEN, assert_close, reordered, rounding

import optax_structured as oxs
from optax_structured.transforms import scale_by_diffgrad

VARIANTS = {0: "abs_sigmoid", 1: "sigmoid", 2: "wide_sigmoid"}
# The slopes of the one-dimensional functions that a file may list, in its order.
SLOPES = (
    lambda x: jnp.where(x <= 0, 2 * x + 0.6, 2 * x - 0.4),
    lambda x: jnp.where(x <= -0.9, -40.0, x * jnp.cos(8 * x) + jnp.sin(8 * x) + 3 * x**2),
    lambda x: jnp.select(
        [x <= -0.5, x <= -0.4, x <= 0, x <= 0.4, x <= 0.5],
        [2 * x, 1.0, -7 / 8, 7 / 8, -1.0],
        2 * x,
    ),
)


def optimizer_of(golden):
    h = golden.meta["hyper"]
    b1, b2 = h["betas"] if "betas" in h else (h["b1"], h["b2"])
    friction = VARIANTS[golden.meta.get("variant", 0)]
    if "1/2" in golden.meta.get("friction", ""):
        friction = "legacy_alias"
    paper = "paper form" in golden.meta.get("eps_placement", "")
    return oxs.diffgrad(
        h["lr"],
        b1=b1,
        b2=b2,
        eps=h["eps"],
        l2=h.get("weight_decay", 0.0),
        friction=friction,
        eps_form="paper" if paper else "code",
    )


def replay(golden, slope):
    """Parameters after each step, for the gradients that `slope(params, t)` gives."""
    optimizer = optimizer_of(golden)

    def step(carry, t):
        params, state = carry
        updates, state = optimizer.update(slope(params, t), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    def run(start, steps):
        return jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))

    return jax.jit(run, static_argnums=1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("diffgrad-"))
def test_golden(name):
    golden = load(name)
    if "x" in golden.arrays:  # closed loops from the start of each row
        x = jnp.asarray(golden.arrays["x"])
        slope = lambda x, t: jnp.stack([f(x[i]) for i, f in enumerate(SLOPES)])  # noqa: E731
        _, path = replay(golden, slope)(x[:, 0], x.shape[1] - 1)
        np.testing.assert_allclose(path.T, x[:, 1:], atol=GOLDEN)
        return
    grads = jax.tree.map(jnp.asarray, golden.leaves("grads"))
    slope = lambda _, t: jax.tree.map(lambda g: g[t], grads)  # noqa: E731
    (_, state), path = replay(golden, slope)(
        jax.tree.map(jnp.asarray, golden.start), golden.meta["steps"]
    )
    for leaf, published in golden.leaves("params").items():
        np.testing.assert_allclose(path[leaf], published, rtol=GOLDEN, atol=GOLDEN)
    for ours, theirs in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        moments = optax.tree.get(state, ours)
        for leaf, published in golden.leaves(f"state/{theirs}").items():
            np.testing.assert_allclose(moments[leaf], published, rtol=GOLDEN, atol=1e-14)


def run(tx, gradients):
    """The update after each gradient."""
    step = lambda state, g: tx.update(g, state)[::-1]  # noqa: E731
    return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]


GRADIENTS = jax.random.normal(jax.random.key(0), (4, 5))


def test_friction_of_one_is_the_inner_transformation():
    adam = optax.scale_by_adam(0.8, 0.95, 1e-3)
    ones = oxs.gradient_friction(adam, jnp.ones_like)
    np.testing.assert_array_equal(run(ones, GRADIENTS), run(adam, GRADIENTS))
    paper = scale_by_diffgrad(0.8, 0.95, 1e-3, friction=jnp.ones_like, eps_form="paper")
    assert_close(run(paper, GRADIENTS), run(adam, GRADIENTS), reordered("float32"))


def test_constant_gradients_are_damped_by_half():
    constant = jnp.broadcast_to(GRADIENTS[0], (3, 5))
    adam = run(optax.scale_by_adam(), constant)
    ours = run(oxs.gradient_friction(optax.scale_by_adam()), constant)
    np.testing.assert_array_equal(ours[1:], adam[1:] / 2)
    assert_close(ours[0], adam[0] * jax.nn.sigmoid(jnp.abs(constant[0])), rounding("float32"))


def test_depends_on_the_unit_of_the_gradient():
    """Adam where gradients jump far, half of it where they are tiny."""
    adam = run(optax.scale_by_adam(eps=0.0), GRADIENTS)
    unit = lambda c: run(oxs.gradient_friction(optax.scale_by_adam(eps=0.0)), c * GRADIENTS)  # noqa: E731
    assert_close(unit(1e4), adam, 1e-5)
    assert_close(unit(1e-6), adam / 2, 1e-5)
    assert jnp.max(jnp.abs(unit(1.0) - unit(10.0))) > 0.01


def test_gradients_of_zero_decay_the_update():
    ours = run(scale_by_diffgrad(b1=0.5, b2=1 - 1e-7), jnp.zeros((4, 2)).at[0].set(1e-3))
    assert bool(jnp.all(jnp.isfinite(ours)))
    np.testing.assert_array_equal(run(scale_by_diffgrad(eps=0.0), jnp.zeros((3, 2))), 0.0)
    adam = oxs.transforms.uncorrected_adam(b1=0.5, b2=0.999)
    moved = run(oxs.gradient_friction(adam), jnp.zeros((5, 2)).at[0].set(1.0))
    assert_close(moved[3:] / moved[2:-1], jnp.full((2, 2), 0.5), 1e-3)


def test_half_precision_keeps_the_last_gradient_in_float32():
    state = scale_by_diffgrad().init(jnp.zeros(3, jnp.bfloat16))
    assert state.previous.dtype == jnp.float32


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: oxs.gradient_friction(optax.identity(), "brake"),
            "friction must be a function or",
        ),
        (
            lambda: scale_by_diffgrad(eps_form="torch"),
            "eps_form must be 'code' or 'paper'",
        ),
        (lambda: oxs.diffgrad(0.1, l2=-1.0), "l2 must be a finite number of at least 0"),
        (lambda: oxs.sign_agreement(1.0), r"decay must be in \[0, 1\)"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def agreement(gradients, decay=0.9):
    monitor = oxs.sign_agreement(decay)
    first = gradients[0]
    state = monitor.init(first)
    assert monitor.update(first, state)[0] is first
    step = lambda state, g: (monitor.update(g, state)[1], None)  # noqa: E731
    return float(jax.lax.scan(step, state, gradients)[0].agreement)


def test_agreement_is_one_for_equal_signs_and_small_for_random_ones():
    assert agreement(jnp.abs(GRADIENTS)) == pytest.approx(1.0, rel=1e-6)
    noise = jax.random.normal(jax.random.key(1), (60, 2000))
    assert agreement(noise) == pytest.approx(0.18, abs=0.02)
    assert agreement(jnp.full((2, 3), jnp.nan)) == 0.0
    assert agreement(GRADIENTS) == pytest.approx(agreement(1e-9 * GRADIENTS))
