"""GGPO and MGPO: when they are plain training, how large they are, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structured as oxs
from optax_structured.adapters import GGPO, MGPO, LoRA, Pair, init, merge, perturbed_value_and_grad

AS_RELEASED = {"sign": -1, "space": "weights", "norm": "per_leaf", "max_multiplier": 10.0}
PARAMS = {"v": jnp.eye(5, 4), "w": jnp.ones((6, 4))}


def adapter():
    start = init(jax.random.key(0), PARAMS, LoRA(2))
    return jax.tree.map(lambda x: x + 0.1, start)


def loss(params, adapter, scale=1.0):
    merged = merge(params, adapter)
    return scale * sum(jnp.sum(jnp.sin(w)) for w in merged.values())


def after_one_step(perturbation, scale=1.0):
    step = perturbed_value_and_grad(loss, perturbation)
    _, gradient, state = step(perturbation.init(PARAMS, adapter()), PARAMS, adapter(), scale)
    return gradient, state


def apart(perturbation, state):
    params, near = perturbation.apply(state, PARAMS, adapter())
    return optax.tree.sub(params, PARAMS), optax.tree.sub(near, adapter())


@pytest.mark.slow
@pytest.mark.parametrize(
    "perturbation",
    [GGPO(), MGPO(), MGPO(**AS_RELEASED), GGPO(0.0, 0.0), MGPO(0.0), MGPO(0.0, **AS_RELEASED)],
)
def test_the_first_step_is_plain_and_all_are_where_it_is_nothing(perturbation):
    want = jax.grad(loss, argnums=1)(PARAMS, adapter())
    gradient, state = after_one_step(perturbation)
    jax.tree.map(np.testing.assert_array_equal, gradient, want)
    off = max(perturbation.rho, 0) if isinstance(perturbation, MGPO) else perturbation.sigma
    moved = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(apart(perturbation, state)))
    assert (moved > 0) == (off > 0)


def test_the_length_is_rho_over_the_norm():
    gradient, state = after_one_step(MGPO(0.3))
    norm = optax.tree.norm(gradient)
    weights, factors = apart(MGPO(0.3), state)
    assert optax.tree.norm(weights) == 0
    np.testing.assert_allclose(optax.tree.norm(factors), 0.3 / norm, rtol=1e-5)
    # It is the ascent point of SAM: along the gradient.
    want = optax.tree.scale(0.3 / norm**2, gradient)
    for x, y in zip(jax.tree.leaves(factors), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("scale, limited", [(1e-2, True), (1.0, False)])
def test_the_released_form_looks_ahead_leaf_by_leaf(scale, limited):
    perturbation = MGPO(0.3, **AS_RELEASED)
    gradient, state = after_one_step(perturbation, scale)
    weights, factors = apart(perturbation, state)
    assert optax.tree.norm(factors) == 0
    for path, pair in adapter().items():
        g = gradient[path]
        direction = (pair.scale * (g.b @ pair.a + pair.b @ g.a)).T
        size = jnp.linalg.norm(direction)
        assert (1 / size > 10) == limited
        np.testing.assert_allclose(
            jnp.linalg.norm(weights[path]), 0.3 * min(1 / size, 10), rtol=1e-4
        )
        assert jnp.vdot(weights[path], direction) < 0


@pytest.mark.parametrize("options", [{}, {**AS_RELEASED, "max_multiplier": None}])
def test_the_scale_of_the_loss_divides_the_length(options):
    perturbation = MGPO(0.3, **options)
    one, ten = (apart(perturbation, after_one_step(perturbation, s)[1]) for s in (1.0, 10.0))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(ten), strict=True):
        np.testing.assert_allclose(x, 10 * y, atol=1e-5)


def test_the_running_norm_and_momentum():
    perturbation = MGPO(0.3, momentum=0.5, beta=0.8)
    step = perturbed_value_and_grad(loss, perturbation)
    g1, state = after_one_step(perturbation)
    _, g2, state = step(state, PARAMS, adapter(), 1.0)
    want = 0.8 * optax.tree.norm(g1) + 0.2 * optax.tree.norm(g2)
    np.testing.assert_allclose(state.norm["w"], want, rtol=1e-5)
    np.testing.assert_allclose(state.momentum["w"].b, 0.5 * g1["w"].b + g2["w"].b, rtol=1e-4)


@pytest.mark.slow
def test_the_noise_has_the_variance_it_says():
    """1000 draws of one row; standard errors of a variance are sqrt(2/n)."""
    perturbation = GGPO(0.5, 0.01)
    _, state = after_one_step(perturbation)
    steps = jnp.arange(1000)
    draws = jax.vmap(lambda t: apart(perturbation, state._replace(step=t))[0]["w"])(steps)
    want = jnp.square(perturbation.scales(state)["w"][:, 0])  # by output, the columns here
    n = draws.shape[0] * draws.shape[1]
    errors = (jnp.mean(jnp.square(draws), axis=(0, 1)) / want - 1) / (2 / n) ** 0.5
    assert jnp.max(jnp.abs(errors)) < 4
    between = jnp.mean(draws[:, 0, 0] * draws[:, 0, 1]) / jnp.sqrt(want[0] * want[1])
    assert abs(between) < 4 / 1000**0.5
    rows = state.rows["w"]
    size = 0.5 * rows.weight + 0.01 * jnp.square(rows.gradient)
    np.testing.assert_allclose(want, jnp.square(size[:, 0]) / 4, rtol=1e-5)


def test_the_noise_depends_on_the_step_alone():
    perturbation = GGPO(0.5, 0.1)
    _, state = after_one_step(perturbation)
    again = apart(perturbation, state)[0]["w"]
    np.testing.assert_array_equal(again, apart(perturbation, state)[0]["w"])
    other = apart(perturbation, state._replace(step=state.step + 1))[0]["w"]
    assert jnp.all(again != other)


def test_a_cap_and_the_quadrature_bound_the_feedback():
    _, state = after_one_step(GGPO())
    huge = {p: rows._replace(gradient=1e3 * rows.weight) for p, rows in state.rows.items()}
    state = state._replace(rows=huge)
    weight, outputs = huge["w"].weight, 4

    def size(**options):
        return GGPO(0.2, 0.1, **options).scales(state)["w"] * outputs**0.5 / weight

    assert jnp.all(size() > 1e4)
    np.testing.assert_allclose(size(cap=0.5), 0.5, rtol=1e-5)
    np.testing.assert_allclose(size(combine="quadrature"), jnp.hypot(0.2, 100.0), rtol=1e-5)


def test_the_frozen_weights_stay_bit_for_bit():
    half = {"w": jnp.ones((6, 4), jnp.bfloat16)}
    perturbation = MGPO(0.3, **AS_RELEASED)
    start = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0), half, LoRA(2)))
    state = perturbation.init(half, start)
    state = perturbation.observe(state, start, start)
    near, _ = perturbation.apply(state, half, start)
    assert near["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half["w"].astype(jnp.float32), 1.0)


def test_mistakes():
    full = init(jax.random.key(0), PARAMS, oxs.rules(default=oxs.adapters.Full()))
    for perturbation in (GGPO(), MGPO()):
        with pytest.raises(ValueError, match="perturbs pairs of LoRA, and this adapter has none"):
            perturbation.init(PARAMS, full)
    for build in (
        lambda: GGPO(-1.0),
        lambda: GGPO(combine="product"),
        lambda: GGPO(cap=0.0),
        lambda: MGPO(-1.0),
        lambda: MGPO(momentum=1.0),
        lambda: MGPO(sign=0),
        lambda: MGPO(space="spectrum"),
        lambda: MGPO(max_multiplier=0.0),
    ):
        with pytest.raises(ValueError):
            build()
    assert isinstance(adapter()["w"], Pair)
