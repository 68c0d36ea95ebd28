"""LV-HBA: the published trajectories, its value function, and feasibility at every step."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from tolerances import GOLDEN

from optax_structured.contrib.bilevel import affine_projection, dykstra, growing_penalty, lv_hba

FILES = sorted(path.stem for path in FOLDER.glob("lv_hba-*.npz"))


def llc(n):
    """Equality of sums; optimum x = -0.3, y1 = 0.7, y2 = -0.4."""

    def upper(x, y):
        y1, y2 = jnp.split(y, 2)
        return 0.5 * jnp.sum((x - y2) ** 2) + 0.5 * jnp.sum((y1 - 1) ** 2)

    def lower(x, y):
        y1, y2 = jnp.split(y, 2)
        return 0.5 * jnp.sum(y1**2) - x @ y1 + jnp.sum(y2)

    def constraint(x, y):
        return jnp.atleast_1d(jnp.sum(x) + jnp.sum(y))

    project = affine_projection(jnp.ones((1, 3 * n)))
    return {"functions": (upper, lower, constraint), "project": project}


def llsc(inputs):
    """A y + H x = 0 below, and B x = 0 above."""
    a, b, h, c, d = (jnp.asarray(inputs[key]) for key in ("A", "B", "H", "c", "d"))

    def upper(x, y):
        return jnp.sin(c @ x + d @ y) + jnp.log(jnp.sum((x + y) ** 2) + 1)

    def lower(x, y):
        return 0.5 * jnp.sum((x - y) ** 2)

    def constraint(x, y):
        return a @ y + h @ x

    def project_lower(x, theta):
        return theta - jnp.linalg.pinv(a) @ constraint(x, theta)

    both = jnp.block([[h, a], [b, jnp.zeros((b.shape[0], a.shape[1]))]])
    return {
        "functions": (upper, lower, constraint),
        "project": affine_projection(both),
        "project_lower": project_lower,
    }


def schedule_of(formula):
    """ "0.025*(k+1)**0.3, k from 0" as a schedule."""
    code = compile(formula.split(",")[0], formula, "eval")
    return lambda count: eval(code, {"__builtins__": {}}, {"k": jnp.asarray(count, float)})


def solver_of(golden):
    h = golden.hyperparameters
    problem = llsc(golden.leaves("inputs")) if golden.leaves("inputs") else llc(golden.meta["n"])
    functions = problem.pop("functions")
    return lv_hba(
        *functions,
        **problem,
        equality=True,
        bound=h.get("u", jnp.inf),
        outer=optax.sgd(h["alpha"]),
        inner=optax.sgd(h["eta"]),
        anchor_rate=h["beta"],
        gamma1=h["gamma1"],
        gamma2=h["gamma2"],
        penalty=schedule_of(h["c_k"]),
    )


def run(solver, x, y, state, steps):
    """All iterates, as (x, y, state) with a leading axis."""

    def step(carry, _):
        carry = solver.update(*carry)
        return carry, carry

    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((x, y, state))[1]


@pytest.mark.parametrize("name", FILES)
def test_golden(name, x64):
    golden = load(name)
    solver = solver_of(golden)
    x, y = (jnp.asarray(golden.start[key]) for key in "xy")
    begin = {key: jnp.asarray(value) for key, value in golden.leaves("state0").items()}
    state = solver.init(x, y)._replace(
        theta=begin["theta"], multipliers=begin["lambda"], anchor=begin["z"]
    )
    gaps = golden.arrays.get("outputs/rel_x_gap")
    xs, ys, states = run(solver, x, y, state, golden.meta["steps"])
    published = golden.leaves("params") | {
        key: golden.arrays[f"state/{key}/{key}"] for key in ("theta", "lambda", "z")
    }
    ours = {"x": xs, "y": ys, "theta": states.theta}
    ours |= {"lambda": states.multipliers, "z": states.anchor}
    for key, want in published.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(
            ours[key].reshape(want.shape), want, atol=GOLDEN * scale, err_msg=key
        )
    if gaps is not None:
        stride = int(re.search(r"every (\d+)-th", golden.meta["layout"])[1])
        got = jnp.linalg.norm(xs[::stride] + 0.3, axis=1) / (0.3 * np.sqrt(x.size))
        np.testing.assert_allclose(got, gaps[: len(got)], rtol=GOLDEN)
    excess = jax.vmap(lambda x, y: jnp.max(jnp.abs(jnp.sum(x) + jnp.sum(y))))
    if golden.meta["case"].startswith("llc"):
        np.testing.assert_allclose(excess(xs, ys), 0.0, atol=1e-10)


def test_convergence_where_the_published_settings_oscillate(x64):
    """n = 10 and a penalty that grows: relative error 2.6e-3 after 10,000 steps."""
    problem = llc(10)
    solver = lv_hba(
        *problem["functions"],
        project=problem["project"],
        equality=True,
        outer=optax.sgd(0.01),
        inner=optax.sgd(0.01),
        anchor_rate=0.02,
        gamma1=10.0,
        gamma2=10.0,
        penalty=growing_penalty(1.0, 0.49),
    )
    start = (-20 * jnp.ones(10), 10 * jnp.ones(20))

    def step(_, carry):
        return solver.update(*carry)

    x, y, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 10_000, step, c))(
        (*start, solver.init(*start))
    )
    assert jnp.linalg.norm(x + 0.3) / (0.3 * np.sqrt(10)) < 4e-3
    np.testing.assert_allclose(jnp.sum(x) + jnp.sum(y), 0.0, atol=1e-11)


A = jax.random.normal(jax.random.key(0), (4, 3))
TARGET = jnp.array([1.0, -2.0, 0.5, 3.0])


def quadratic(x, y):
    return 0.5 * jnp.sum((A @ y - TARGET - x[0]) ** 2)


def below(x, y):
    """An inequality on each entry of y, moved by x."""
    return y - x[1:]


def test_one_step_is_the_equations(x64):
    """Inequalities: old theta and multipliers for both, new ones for x and y, then z."""
    x, y = jnp.array([0.3, 0.2, -0.1, 0.4]), jnp.array([0.5, -0.2, 0.1])
    upper = lambda x, y: jnp.sum(jnp.sin(x)) + jnp.sum(y**3)  # noqa: E731
    solver = lv_hba(
        upper, quadratic, below, outer=optax.sgd(0.03), inner=optax.sgd(0.05),
        anchor_rate=0.2, gamma1=2.0, gamma2=3.0, penalty=growing_penalty(0.5, 0.3), bound=0.11,
    )  # fmt: skip
    theta, lam, z = (
        jnp.array([0.1, 0.2, 0.3]),
        jnp.array([0.1, 0.0, 0.05]),
        jnp.array([0.0, 0.1, 0.2]),
    )
    state = solver.init(x, y)._replace(theta=theta, multipliers=lam, anchor=z)
    state = state._replace(clock=state.clock._replace(count=jnp.int32(7)))
    got_x, got_y, after = jax.jit(solver.update)(x, y, state)
    f = types.SimpleNamespace(x=jax.grad(quadratic), y=jax.grad(quadratic, argnums=1))
    d_theta = f.y(x, theta) + lam + (theta - y) / 2  # the derivative of g in y is the identity
    d_lam = -below(x, theta) + (lam - z) / 3
    theta, lam = theta - 0.05 * d_theta, jnp.clip(lam - 0.05 * d_lam, 0, 0.11)
    c = 0.5 * 8**0.3
    g_x = -jnp.concatenate([jnp.zeros(1), lam])
    d_x = jnp.cos(x) / c + f.x(x, y) - f.x(x, theta) - g_x
    d_y = 3 * y**2 / c + f.y(x, y) - (y - theta) / 2
    z = jnp.clip(z + 0.2 * (lam - z) / 3, 0, 0.11)
    want = [x - 0.03 * d_x, y - 0.03 * d_y, theta, lam, z]
    for ours, theirs in zip([got_x, got_y, *after[1:4]], want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def settled(solver, x, y, steps=4000):
    """theta and multipliers at the saddle point of fixed x, y and z."""
    state = solver.init(x, y)._replace(anchor=jnp.array([0.2, 0.1, 0.3]))

    def step(_, state):
        after = solver.update(x, y, state)[2]
        return after._replace(anchor=state.anchor)

    return jax.jit(lambda s: jax.lax.fori_loop(0, steps, step, s))(state)


def test_directions_are_those_of_the_envelope(x64):
    """At the saddle point: d_y = grad f - grad of v, against differences of v itself."""
    solver = lv_hba(
        lambda x, y: 0.0 * jnp.sum(y), quadratic, below,
        outer=optax.sgd(1.0), inner=optax.sgd(0.05), anchor_rate=0.0, gamma1=2.0, gamma2=3.0,
    )  # fmt: skip
    x, y = jnp.array([0.3, 0.2, -0.1, 0.4]), jnp.array([0.5, -0.2, 0.1])

    def value(x, y):
        s = settled(solver, x, y)
        saddle = quadratic(x, s.theta) + s.multipliers @ below(x, s.theta)
        near = jnp.sum((s.theta - y) ** 2) / 4 - jnp.sum((s.multipliers - s.anchor) ** 2) / 6
        return quadratic(x, y) - (saddle + near)

    moved_x, moved_y, _ = solver.update(x, y, settled(solver, x, y))
    flat = jnp.concatenate([x, y])
    value_of = jax.jit(lambda p: value(p[:4], p[4:]))
    differences = [
        (value_of(flat.at[i].add(1e-5)) - value_of(flat.at[i].add(-1e-5))) / 2e-5
        for i in range(flat.size)
    ]
    np.testing.assert_allclose(
        jnp.concatenate([x - moved_x, y - moved_y]), jnp.stack(differences), atol=1e-7
    )


def test_without_an_upper_level_feasible_optima_stay(x64):
    """y >= 1 - x: descent is normal to the feasible set there, and the projection undoes it."""

    def project(point):
        x, y = point
        lift = jnp.maximum(0, 1 - x - y) / 2
        return x + lift, y + lift

    solver = lv_hba(
        lambda x, y: 0.0 * jnp.sum(y),
        lambda x, y: 0.5 * jnp.sum(y**2),
        lambda x, y: 1 - x - y,
        project=project,
        outer=optax.sgd(0.05),
        inner=optax.sgd(0.05),
    )
    x = jnp.array([0.4])
    y = 1 - x
    state = solver.init(x, y)._replace(multipliers=y, anchor=y)
    xs, ys, _ = run(solver, x, y, state, 50)
    np.testing.assert_allclose(xs, 0.4, atol=1e-12)
    np.testing.assert_allclose(ys, 0.6, atol=1e-12)


@pytest.mark.slow
def test_no_constraint_any_optimizer_trees_and_float32():
    solver = lv_hba(
        lambda x, y: jnp.sum((y["w"] - 3.0) ** 2),
        lambda x, y: jnp.sum((y["w"] - x["a"]) ** 2),
        outer=optax.adam(0.05),
        inner=optax.sgd(0.1, momentum=0.5),
    )
    x, y = {"a": jnp.zeros(2)}, {"w": jnp.zeros(2)}
    state = solver.init(x, y)
    assert state.multipliers.shape == (0,)
    xs, ys, states = run(solver, x, y, state, 500)
    np.testing.assert_allclose(ys["w"][-1], 3.0, atol=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves((xs, ys, states.theta))} == {
        jnp.dtype("float32")
    }
    starts = jax.tree.map(lambda a: jnp.stack([a, a + 1]), (x, y))
    many = jax.vmap(lambda x, y: solver.update(x, y, solver.init(x, y))[0]["a"])(*starts)
    np.testing.assert_allclose(many[0], solver.update(x, y, state)[0]["a"], rtol=1e-6)


def test_projections(x64):
    """Dependent equations; and Dykstra's point against the exact one, where plain turns fail."""
    matrix = jnp.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]])
    got = affine_projection(matrix, jnp.array([1.0, 2.0]))((jnp.ones(2), jnp.zeros(1)))
    np.testing.assert_allclose(got[0] @ jnp.array([1.0, 2.0]), 1.0, rtol=1e-12)
    np.testing.assert_allclose(got[0] - 1, (-2 / 5) * jnp.array([1.0, 2.0]), rtol=1e-12)
    line = affine_projection(jnp.array([[1.0, 1.0]]), 1.0)
    ball = functools.partial(optax.projections.projection_l2_ball, scale=1.0)
    corner = dykstra(line, optax.projections.projection_non_negative, ball, rounds=200)
    np.testing.assert_allclose(corner(jnp.array([3.0, -1.0])), [1.0, 0.0], atol=1e-3)


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="gamma1 must be a finite number above 0"):
        lv_hba(quadratic, quadratic, gamma1=0.0)
    with pytest.raises(ValueError, match=r"array of shape \(\); return a vector"):
        lv_hba(quadratic, quadratic, quadratic).init(jnp.ones(4), jnp.ones(3))
    with pytest.raises(ValueError, match="at least one round"):
        dykstra(rounds=3)
