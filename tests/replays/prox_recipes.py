"""ProxSGD in both forms, ProxAdamW and ProxGen, ProxSSI."""

import math
from typing import Any

import jax.numpy as jnp
import optax
from golden_files import Golden, Settings
from replays.galore import YES_OR_NO
from replays.proximal import regularised, regularizer, schedules, solver
from replays.running import assert_run, by_name
from tolerances import GOLDEN, GOLDEN_INEXACT, SHIFTED_ARCCOS

import optax_structured as oxs


def prox_sgd(golden: Golden) -> None:
    h = golden.settings()
    if "rho" in h:
        relaxed(golden, h)
        return
    s, penalty = schedules(golden, h), regularizer(golden, h, h["regularizer"])
    tx = oxs.prox_sgd(s.learning_rate, penalty, h["lambda_"], momentum=s.momentum)
    h.check_all_read()
    assert_run(golden, tx, same_zeros=True)


def relaxed(golden: Golden, h: Settings) -> None:
    """As Yang et al. published it, with steps and momentum that follow powers of the count."""

    def power(start: str, exponent: str) -> Any:
        first, offset, p = h[start], h["step_offset"] + 1, h[exponent]  # steps count from 1 there
        return lambda count: first / (jnp.asarray(count, float) + offset) ** p

    new = power("rho", "rho_decay")
    penalty = oxs.L1()
    if "clip_bounds" in h:
        low, high = h["clip_bounds"]
        bounds = -math.inf if low is None else low, math.inf if high is None else high
        penalty = oxs.Box(*bounds, penalty=penalty)
    tx = oxs.prox_sgd_relaxed(
        power("epsilon", "epsilon_decay"),
        by_name(dict.fromkeys(regularised(golden, h.get("regularizer", "l1")), penalty)),
        h["mu"],
        momentum=lambda count: 1 - new(count),
        b2=h["beta"],
        eps=h["delta"],
    )
    h.check_all_read()
    assert_run(golden, tx, same_zeros=True)


def prox_adam(golden: Golden) -> None:
    """ProxAdamW, with a `lambda_`, and ProxGen, whose files call it `penalty`."""
    h = golden.settings()
    s, solve, kind = schedules(golden, h), solver(h), h["regularizer"]
    b1, b2 = h["betas"]
    tx = oxs.prox_adam(
        s.learning_rate,
        regularizer(golden, h, kind),
        h["penalty" if "penalty" in h else "lambda_"],
        b1=b1,
        b2=b2,
        eps=s.eps,
        weight_decay=h.get("weight_decay", 0.0),
        amsgrad=h.one_of("amsgrad", YES_OR_NO, default=False),
        solver=solve,
    )
    h.check_all_read()
    tolerance = GOLDEN if solve == oxs.Exact() else GOLDEN_INEXACT
    if kind.startswith("l12"):  # their code adds 1e-4 to |x| inside the arccos
        assert_run(golden, tx, tolerance=SHIFTED_ARCCOS, same_zeros=True)
        if not golden.leaves("params_exact"):
            return
    target = "params_exact" if golden.leaves("params_exact") else "params"
    assert_run(golden, tx, target=target, tolerance=tolerance, same_zeros=True)


def prox_ssi(golden: Golden) -> None:
    h = golden.settings()
    kind = h["penalty"]
    s, penalty = schedules(golden, h), regularizer(golden, h, kind)
    h.pass_over("newton_atol", "newton_rtol", "newton_max_iters")
    b1, b2 = h["betas"]
    # The penalty of a concave group is multiplied by the learning rate as a whole.
    strength = 1.0 if kind == "group_mcp" else h["lambda_"]
    decay = h.get("weight_decay", 0.0)
    if h.one_of("correct_bias", YES_OR_NO, default=True):
        tx = oxs.prox_ssi(
            s.learning_rate, penalty, strength, b1=b1, b2=b2, eps=s.eps, weight_decay=decay
        )
    else:
        eta = s.learning_rate
        rate = lambda count: (lr := eta(count) if callable(eta) else eta) * (1 - lr * decay)  # noqa: E731
        tx = optax.chain(
            oxs.moving_average(rate, b1, debias=False, weight=eta, weight_decay=decay),
            oxs.adam_preconditioner(b2, s.eps, debias=False),
            oxs.prox_step(penalty, strength),
        )
    h.check_all_read()
    assert_run(golden, tx, same_zeros=True)
