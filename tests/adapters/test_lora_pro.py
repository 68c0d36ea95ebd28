"""What the gradients of LoRA-Pro must be, against dense solves and projections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import reordered

from optax_structured.adapters import Damped, MinimumNorm, Pair, lora_pro, lora_pro_full
from optax_structured.adapters.factor_gradients import equivalent

SCALE = 1.5
M, N, R = 7, 5, 3


def normal(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def case(seed=0, r=R, zero_b=False):
    b, a = normal(M, r, seed=seed), normal(r, N, seed=seed + 1)
    pair = Pair(a, jnp.zeros_like(b) if zero_b else b, SCALE)
    return pair, normal(M, N, seed=seed + 2)


def plain(pair, g):
    return Pair(SCALE * pair.b.T @ g, SCALE * g @ pair.a.T, SCALE)


@functools.partial(jax.jit, static_argnums=0)
def solved(solver, pair, gradient):
    return lora_pro(solver).update(gradient, optax.EmptyState(), pair)[0]


def jacobian(pair):
    """Of vec(s (b dA + dB a)) in (dA, dB)."""
    r = pair.rank
    of_a = SCALE * np.kron(pair.b, np.eye(N))
    of_b = SCALE * np.kron(np.eye(M), pair.a.T)
    assert of_a.shape == (M * N, r * N) and of_b.shape == (M * N, M * r)
    return np.concatenate([of_a, of_b], axis=1)


def parts(pair, x):
    r = pair.rank
    return x[: r * N].reshape(r, N), x[r * N :].reshape(M, r)


def close(x, y, tolerance=1e-9):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.slow
@pytest.mark.parametrize("delta, tolerance", [(0.0, 1e-12), (1e-8, 1e-6)])
def test_it_is_the_minimum_norm_least_squares_solution(delta, tolerance):
    pair, g = case()
    want = parts(pair, np.linalg.pinv(jacobian(pair)) @ np.ravel(g))
    got = solved(MinimumNorm(delta), pair, plain(pair, g))
    close(got.a, want[0], tolerance)
    close(got.b, want[1], tolerance)
    close(pair.b.T @ got.b, got.a @ pair.a.T, tolerance)


@pytest.mark.parametrize("zero_b", [False, True])
def test_the_damped_form_is_a_dense_solve(zero_b):
    pair, g = case(zero_b=zero_b)
    j = jacobian(pair)
    penalty = 0.3 * SCALE**2 * (jnp.sum(pair.a**2) + jnp.sum(pair.b**2)) / (2 * R)
    want = parts(pair, np.linalg.solve(j.T @ j + penalty * np.eye(j.shape[1]), j.T @ np.ravel(g)))
    got = solved(Damped(0.3), pair, plain(pair, g))
    close(got.a, want[0], 1e-12)
    close(got.b, want[1], 1e-12)


def test_a_large_damping_is_plain_lora_and_a_small_one_the_published_form():
    pair, g = case()
    gradient = plain(pair, g)
    far = solved(Damped(1e9), pair, gradient)
    ratio = jnp.vdot(far.a, gradient.a) / jnp.vdot(gradient.a, gradient.a)
    close(far.a / ratio, gradient.a, 1e-6)
    close(far.b / ratio, gradient.b, 1e-6)
    near, want = solved(Damped(1e-12), pair, gradient), solved(MinimumNorm(0.0), pair, gradient)
    close(near.a, want.a)
    close(near.b, want.b)


def test_the_weight_moves_by_the_projected_gradient():
    pair, g = case()
    of_b, of_a = pair.b @ np.linalg.pinv(pair.b), np.linalg.pinv(pair.a) @ pair.a
    want = of_b @ g + (np.eye(M) - of_b) @ g @ of_a
    for x in ("sylvester", "zero"):
        got = solved(MinimumNorm(0.0, x), pair, plain(pair, g))
        close(equivalent(pair, got.a, got.b), want)
    assert jnp.linalg.norm(want) <= jnp.linalg.norm(g)
    # So the loss falls, to first order, by its square.
    close(jnp.vdot(g, want), jnp.sum(want**2))
    whole, g = case(r=N)
    got = solved(MinimumNorm(0.0), whole, plain(whole, g))
    close(equivalent(whole, got.a, got.b), g)


def test_other_factors_of_the_same_product():
    pair, g = case()
    q, _ = np.linalg.qr(normal(R, R, seed=9))
    turned = Pair(q.T @ pair.a, pair.b @ q, SCALE)
    for solver in (MinimumNorm(0.0), Damped()):
        one, other = (solved(solver, p, plain(p, g)) for p in (pair, turned))
        close(other.a, q.T @ one.a)
        close(other.b, one.b @ q)
    skew = normal(R, R, seed=9)
    other = Pair(np.linalg.inv(skew) @ pair.a, pair.b @ skew, SCALE)
    one, two = (solved(MinimumNorm(0.0), p, plain(p, g)) for p in (pair, other))
    close(equivalent(other, two.a, two.b), equivalent(pair, one.a, one.b), 1e-8)


def test_at_zero():
    pair, g = case(zero_b=True)
    got = solved(MinimumNorm(), pair, plain(pair, g))
    gram = np.linalg.inv(pair.a @ pair.a.T)
    np.testing.assert_array_equal(got.a, 0.0)
    close(got.b, SCALE * g @ pair.a.T @ gram / SCALE**2, 1e-6)
    nothing = jax.tree.map(jnp.zeros_like, pair)
    for solver in (MinimumNorm(), MinimumNorm(0.0), Damped()):
        got = solved(solver, nothing, plain(nothing, g))
        assert all(jnp.all(x == 0) for x in jax.tree.leaves(got))


def jump(solver, rate):
    """How far a moves, relative to its norm, at the second step of SGD from b = 0."""
    pair, g = case(zero_b=True)
    first = solved(solver, pair, plain(pair, g))
    second = Pair(pair.a - rate * first.a, pair.b - rate * first.b, SCALE)
    moved = solved(solver, second, plain(second, normal(M, N, seed=20)))
    return float(rate * jnp.linalg.norm(moved.a) / jnp.linalg.norm(pair.a))


def test_the_jump_of_the_second_step_is_gone_with_damping():
    assert jump(MinimumNorm(), 1e-2) > 0.1
    assert jump(MinimumNorm(), 1e-3) > 0.1
    assert jump(Damped(), 1e-2) < 0.02
    assert jump(Damped(), 1e-3) < 0.002


def test_float32_is_as_good_as_its_rounding():
    pair, g = case()
    thin = Pair(pair.a * jnp.array([[1.0], [1e-2], [1e-3]]), pair.b, SCALE)  # a condition of 1e3
    want = solved(MinimumNorm(), thin, plain(thin, g))
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), (thin, plain(thin, g)))
    got = solved(MinimumNorm(), *narrow)
    assert got.a.dtype == jnp.float32
    close(got.b, want.b, 1e3 * reordered(jnp.float32))


@pytest.mark.slow
def test_stacked_and_equal_shapes_are_solved_as_alone():
    singles = [case(seed) for seed in (0, 10)]
    pairs = {str(i): pair for i, (pair, _) in enumerate(singles)}
    grads = {str(i): plain(*single) for i, single in enumerate(singles)}
    stack = jax.tree.map(lambda *x: jnp.stack(x), *pairs.values())
    together = lora_pro().update(
        {**grads, "head": jnp.ones(2)}, None, {**pairs, "head": jnp.ones(2)}
    )
    np.testing.assert_array_equal(together[0]["head"], 1.0)
    stacked = solved(Damped(), stack, jax.tree.map(lambda *x: jnp.stack(x), *grads.values()))
    for i, (pair, g) in enumerate(singles):
        want = solved(Damped(), pair, plain(pair, g))
        close(together[0][str(i)].b, want.b)
        close(stacked.b[i], want.b)
        close(stacked.a[i], want.a)


def test_the_weight_space_form_runs_any_transformation():
    """Without one, it solves for what it has solved for already."""
    pair, g = case()
    tx = lora_pro_full(optax.identity(), MinimumNorm(0.0))
    got, _ = tx.update({"w": plain(pair, g)}, tx.init({"w": pair}), {"w": pair})
    want = solved(MinimumNorm(0.0), pair, plain(pair, g))
    close(got["w"].a, want.a)
    close(got["w"].b, want.b)
    state = lora_pro_full(optax.scale_by_adam()).init({"w": pair})
    assert state.mu["w"].shape == (N, M)
    thin = lora_pro_full(optax.scale_by_factored_rms(min_dim_size_to_factor=2)).init({"w": pair})
    assert sum(x.size for x in jax.tree.leaves(thin)) < N * M


def test_mistakes():
    pair, g = case()
    for tx in (lora_pro(), lora_pro_full(optax.sgd(0.1))):
        with pytest.raises(ValueError, match="needs params, the adapter"):
            tx.update(plain(pair, g), tx.init(pair))
    with pytest.raises(ValueError, match="above 0"):
        Damped(0.0)
    with pytest.raises(ValueError, match="at least 0"):
        MinimumNorm(-1.0)
    with pytest.raises(ValueError, match="'sylvester' or 'zero'"):
        MinimumNorm(x="symmetry")
