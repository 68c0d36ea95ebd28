"""The published trajectories, step by step, in float64. A new file joins by adding one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import FOLDER, load
from tolerances import GOLDEN, GOLDEN_INEXACT, RELEASED_STOP, SHIFTED_ARCCOS

import optax_structured as oxs

pytestmark = pytest.mark.usefixtures("x64")

INPUTS = oxs.GroupLasso(group_axis=1)
NUCLEAR = oxs.NuclearNorm()


def weights_only(regularizer):
    return oxs.rules(("bias", None), default=regularizer)


def ramda(h, regularizer, **kwargs):
    return oxs.ramda(
        h["lr"],
        regularizer,
        h["lambda_"],
        momentum=1 - h["momentum"],
        eps=h["epsilon"],
        keep_point=True,
        **kwargs,
    )


def ramda_pg(h, regularizer):
    return ramda(
        h, regularizer, solver=oxs.ProximalGradient(max_iters=h["max_iters"], rtol=h["rtol"])
    )


def stages_of(h):
    per_epoch = h["steps_per_epoch"]
    return oxs.Stages([epoch * per_epoch for epoch in h["milestones_epochs"]], gamma=h["gamma"])


def ramda_stages(h, epochs_early):
    stages = stages_of(h)
    growth_start = stages.milestones[-1] - epochs_early * h["steps_per_epoch"]
    recipe = oxs.ramda(
        stages.decay(h["lr"]),
        INPUTS,
        h["lambda_"],
        momentum=stages.momentum(1 - h["momentum"], growth_start=growth_start),
        eps=stages.decay(h["epsilon"]),
        keep_point=True,
    )
    return oxs.restart_at(recipe, stages.milestones)


def rmda(h, regularizer):
    return oxs.rmda(h["lr"], regularizer, h["lambda_"], momentum=1 - h["momentum"])


def rmda_stages(h):
    stages = stages_of(h)
    momentum = stages.momentum(1 - h["momentum"], rule="per_stage")
    recipe = oxs.rmda(stages.decay(h["lr"]), INPUTS, h["lambda_"], momentum=momentum)
    return oxs.restart_at(recipe, stages.milestones)


def prox_sgd(h, regularizer):
    return oxs.prox_sgd(h["lr"], regularizer, h["lambda_"], momentum=1 - h["momentum"])


def yang(h, regularizer):
    # Steps count from 1 in the publication, from 0 in schedules.
    shifted = lambda count: jnp.asarray(count, float) + 1 + h["step_offset"]  # noqa: E731
    return oxs.prox_sgd_relaxed(
        lambda count: h["epsilon"] / shifted(count) ** h["epsilon_decay"],
        regularizer,
        h["mu"],
        momentum=lambda count: 1 - h["rho"] / shifted(count) ** h["rho_decay"],
        b2=h["beta"],
        eps=h["delta"],
    )


def prox_adam(h, regularizer, strength="lambda_", **kwargs):
    b1, b2 = h["betas"]
    return oxs.prox_adam(
        h["lr"],
        regularizer,
        h[strength],
        b1=b1,
        b2=b2,
        eps=h["epsilon"],
        weight_decay=h["weight_decay"],
        amsgrad=h.get("amsgrad", False),
        **kwargs,
    )


def prox_ssi(h, regularizer, strength):
    b1, b2 = h["betas"]
    return oxs.prox_ssi(h["lr"], regularizer, strength, b1=b1, b2=b2, eps=h["epsilon"])


def madgrad(h, weight_decay=0.0):
    # MADGRAD adds eps to its learning rate, and RAMDA wants an eps above 0.
    eps = max(h["eps"], 1e-60)
    return oxs.ramda(h["lr"] + h["eps"], momentum=h["momentum"], eps=eps)


def madgrad_coupled(h):
    return optax.chain(optax.add_decayed_weights(h["weight_decay"]), madgrad(h))


def madgrad_decoupled(h):
    rate = h["lr"] + h["eps"]
    return optax.chain(madgrad(h), optax.add_decayed_weights(-rate * h["weight_decay"]))


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    recipe: object  # (hyperparameters) -> GradientTransformation
    rtol: float = GOLDEN
    target: str = "params"


LINES = (
    Line("ramda-glasso_linear_exact", lambda h: ramda(h, INPUTS)),
    Line("ramda-glasso_conv_exact", lambda h: ramda(h, INPUTS)),
    Line("ramda-glasso_linear_pg100", lambda h: ramda_pg(h, INPUTS), GOLDEN_INEXACT),
    Line("ramda-glasso_conv_pg100", lambda h: ramda_pg(h, INPUTS), GOLDEN_INEXACT),
    Line("ramda-nuclear_exact", lambda h: ramda(h, NUCLEAR)),
    Line("ramda-nuclear_pg5", lambda h: ramda_pg(h, NUCLEAR), GOLDEN_INEXACT),
    Line("ramda-nuclear_pg100", lambda h: ramda_pg(h, NUCLEAR), GOLDEN_INEXACT),
    Line("ramda-stages_released", lambda h: ramda_stages(h, epochs_early=0)),
    Line("ramda-stages_experiments", lambda h: ramda_stages(h, epochs_early=1)),
    Line("rmda-glasso", lambda h: rmda(h, INPUTS)),
    Line("rmda-glasso_no_momentum", lambda h: rmda(h, INPUTS)),
    Line("rmda-l1", lambda h: rmda(h, weights_only(oxs.L1()))),
    Line("rmda-nuclear", lambda h: rmda(h, NUCLEAR)),
    Line("rmda-stages2021", rmda_stages),
    Line("prox_sgd-glasso", lambda h: prox_sgd(h, INPUTS)),
    Line("prox_sgd-nuclear", lambda h: prox_sgd(h, NUCLEAR)),
    Line("prox_sgd-yang_l1", lambda h: yang(h, oxs.L1())),
    Line("prox_sgd-yang_l1_box", lambda h: yang(h, oxs.Box(*h["clip_bounds"], penalty=oxs.L1()))),
    Line("prox_adamw-glasso_exact", lambda h: prox_adam(h, INPUTS)),
    Line("prox_adamw-glasso_amsgrad_wd_exact", lambda h: prox_adam(h, INPUTS)),
    Line(
        "prox_adamw-glasso_pg100",
        lambda h: prox_adam(h, INPUTS, solver=oxs.ProximalGradient(h["max_iters"], h["rtol"])),
        GOLDEN_INEXACT,
    ),
    Line("prox_adamw-nuclear_exact", lambda h: prox_adam(h, NUCLEAR)),
    Line("prox_gen-l0", lambda h: prox_adam(h, weights_only(oxs.L0()), "penalty")),
    Line("prox_gen-l1", lambda h: prox_adam(h, weights_only(oxs.L1()), "penalty")),
    Line(
        "prox_gen-l12",
        lambda h: prox_adam(h, weights_only(oxs.LHalf()), "penalty"),
        target="params_exact",
    ),
    Line("prox_gen-l23", lambda h: prox_adam(h, weights_only(oxs.LTwoThirds()), "penalty")),
    Line("prox_ssi-l1_l2", lambda h: prox_ssi(h, INPUTS, h["lambda_"])),
    Line(
        "prox_ssi-group_mcp",
        lambda h: prox_ssi(h, oxs.GroupMCP(1, threshold=h["lambda_"], gamma=h["gamma"]), 1.0),
    ),
    Line("madgrad-momentum", madgrad),
    Line("madgrad-momentum0", madgrad),
    Line("madgrad-eps0", madgrad),
    Line("madgrad-weight_decay", madgrad_coupled),
    Line("madgrad-decoupled_decay", madgrad_decoupled),
)

# Published runs that are wrong, with what is wrong: not matched, and seen to be different.
SLIPS = {
    # The released stopping test counts the smooth part once per surviving group: it stops early.
    "ramda-glasso_linear_released_stop": Line(
        "ramda-glasso_linear_released_stop", lambda h: ramda_pg(h, INPUTS), rtol=RELEASED_STOP
    ),
    # 1e-4 is added to |x| inside the arccos of the l1/2 formula.
    "prox_gen-l12": Line(
        "prox_gen-l12",
        lambda h: prox_adam(h, weights_only(oxs.LHalf()), "penalty"),
        rtol=SHIFTED_ARCCOS,
    ),
}


def trajectory(line):
    """Parameters, and the recorded prox points if any, after each step."""
    golden = load(line.name)
    tx = line.recipe(golden.hyperparameters)
    current = jax.tree.map(jnp.asarray, golden.start)
    state = tx.init(current)

    @jax.jit
    def step(grads, state, current):
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    params, points = [], []
    for grads in golden.steps("grads"):
        current, state = step(jax.tree.map(jnp.asarray, grads), state, current)
        params.append(current)
        if golden.leaves("state/w_hat"):
            points.append(oxs.prox_point(state))
    return params, points


def distance(got, expected):
    """Largest error of any leaf of any step, relative to the largest entry of that leaf."""
    worst = 0.0
    for got_step, expected_step in zip(got, expected, strict=True):
        for name, e in expected_step.items():
            error = np.max(np.abs(np.asarray(got_step[name]) - e))
            worst = max(worst, error / np.max(np.abs(e), initial=np.finfo(float).tiny))
    return worst


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_trajectory(line):
    golden = load(line.name)
    params, points = trajectory(line)
    for got, key in ((params, line.target), (points, "state/w_hat")):
        if not got:
            continue
        expected = golden.steps(key)
        assert distance(got, expected) <= line.rtol
        for got_step, expected_step in zip(got, expected, strict=True):
            for name, e in expected_step.items():
                np.testing.assert_array_equal(got_step[name] == 0, e == 0, err_msg=name)


@pytest.mark.parametrize("name", SLIPS)
def test_known_difference(name):
    line = SLIPS[name]
    assert 10 * GOLDEN < distance(trajectory(line)[0], load(name).steps("params")) < line.rtol


def test_published_two_thirds_is_nan_where_ours_is_zero():
    """A tiny metric (dead weights): the argument of their acosh falls below 1."""
    u, metric, strength = 0.3, 1e-8, 0.02
    mu = 2 * strength / metric
    assert 27 / 16 * (u**2 + 100) * mu**-1.5 < 1  # they shift the square by 100 to hide it
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.arccosh(27 / 16 * (u**2 + 100) * mu**-1.5))
    assert oxs.LTwoThirds().prox(jnp.asarray(u), metric, strength) == 0.0


def test_rank_of_the_published_nuclear_run():
    """The thresholded singular values of the dual-averaging point, from the recorded point."""
    golden = load("rmda-nuclear")
    h = golden.hyperparameters
    tx = oxs.rmda(h["lr"], NUCLEAR, h["lambda_"], momentum=1 - h["momentum"], keep_point=True)
    current = jax.tree.map(jnp.asarray, golden.start)
    state = tx.init(current)
    for grads, expected in zip(
        golden.steps("grads"), golden.steps("state/singular_values"), strict=True
    ):
        updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, current)
        current = optax.apply_updates(current, updates)
        for name, values in expected.items():
            got = np.linalg.svd(oxs.prox_point(state)[name], compute_uv=False)
            np.testing.assert_allclose(got, values, atol=GOLDEN)


def test_every_file_is_in_the_table():
    families = ("ramda-", "rmda-", "prox_sgd-", "prox_adamw-", "prox_gen-", "prox_ssi-", "madgrad-")
    files = {p.stem for p in FOLDER.glob("*.npz") if p.stem.startswith(families)}
    assert files == {line.name for line in LINES} | SLIPS.keys()
