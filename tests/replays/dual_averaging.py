"""RAMDA and RMDA, in stages or not."""

from typing import Any

import numpy as np
import optax
from golden_files import Golden
from replays.proximal import Schedules, regularizer, schedules, solver
from replays.running import assert_run
from tolerances import GOLDEN, GOLDEN_INEXACT, RELEASED_STOP

import optax_structured as oxs


def ramda(golden: Golden) -> None:
    h = golden.settings()
    s, solve = schedules(golden, h, dual_averaging=True), solver(h)
    penalty = regularizer(golden, h, h["regularizer"])
    tx = oxs.ramda(
        s.learning_rate,
        penalty,
        h["lambda_"],
        momentum=s.momentum,
        eps=s.eps,
        solver=solve,
        keep_point=True,
    )
    h.check_all_read()
    if "not a target to match" in golden.prose.lower():
        # The released stopping test counts the smooth part once per surviving group.
        assert_run(golden, tx, tolerance=RELEASED_STOP)
        return
    tolerance = GOLDEN if solve == oxs.Exact() else GOLDEN_INEXACT
    assert_run(golden, restarted(tx, s), points, tolerance=tolerance, same_zeros=True)


def rmda(golden: Golden) -> None:
    h = golden.settings()
    s = schedules(golden, h, dual_averaging=True)
    penalty = regularizer(golden, h, h["regularizer"])
    tx = oxs.rmda(s.learning_rate, penalty, h["lambda_"], momentum=s.momentum, keep_point=True)
    h.check_all_read()

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        found = points(state, current)
        matrices = {leaf: w for leaf, w in found["w_hat"].items() if w.ndim == 2}
        spectra = {leaf: shrunk(w) for leaf, w in matrices.items()}
        return found | {"singular_values": spectra}

    assert_run(golden, restarted(tx, s), look, same_zeros=True)


def restarted(tx: optax.GradientTransformation, s: Schedules) -> optax.GradientTransformation:
    return oxs.restart_at(tx, s.milestones) if s.milestones else tx


def shrunk(w: Any) -> np.ndarray:
    """Singular values, exactly zero where the rank ends."""
    return np.where(oxs.NuclearNorm().support(w), np.linalg.svd(w, compute_uv=False), 0.0)


def points(state: Any, current: Any) -> dict[str, dict[str, Any]]:
    return {"w_hat": oxs.prox_point(state)}
