"""Fira, with Adam or RMSProp inside."""

from typing import Any

import numpy as np
from golden_files import Golden
from replays.galore import bases, with_adam, with_rms
from replays.low_rank import Specs, published
from replays.running import assert_run, find, held
from tolerances import GOLDEN

import optax_structured as oxs

EPS = 1e-8  # of its limiter and of its factors


def adamw(golden: Golden) -> None:
    run(golden, with_adam)


def rmsprop(golden: Golden) -> None:
    run(golden, with_rms)


def run(golden: Golden, with_inner: Any) -> None:
    h = golden.settings()
    alpha, growth = h.get("alpha", 1.0), h.get("limiter_gamma", 1.01)
    h.must_be(limiter_eps=EPS, scale_eps=EPS)
    active = h.get("limiter_active", {})
    specs = published(golden, h, residual=oxs.NormScaled(growth=growth))
    tx = with_inner(oxs.fira, golden, h, specs, alpha)
    norms: dict[str, list[float]] = {}

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        found = held(golden, find(state, oxs.low_rank.LowRankState).residual)
        seen = {n: x for n, x in found.items() if alpha != 1 or not is_whole(golden, specs, n)}
        for leaf, norm in seen.items():
            norms.setdefault(leaf, []).append(float(norm))
        return bases(golden, specs, state) | {"limiter_norm": seen}

    assert_run(golden, tx, look)
    for leaf, flags in active.items():
        if leaf in norms:
            limited = np.asarray(norms[leaf])
            at_limit = limited[1:] >= (1 - GOLDEN) * growth * (limited[:-1] + EPS)
            np.testing.assert_array_equal([False, *at_limit], flags, err_msg=leaf)


def is_whole(golden: Golden, specs: Specs, leaf: str) -> bool:
    """Whether the subspace is the whole space: what is left over is rounding error."""
    return specs[leaf].rank >= min(golden.start[leaf].shape)
