"""LDAdamW."""

from typing import Any

from golden_files import Golden
from replays.galore import YES_OR_NO
from replays.low_rank import of_rank, projected
from replays.running import adam, assert_run, by_name, find, held, rate

import optax_structured as oxs

PROJECTORS = {"power_iteration": None, "svd": oxs.SVD()}


def ldadamw(golden: Golden) -> None:
    h = golden.settings()
    projector = h.one_of("proj_method", PROJECTORS, default="power_iteration")
    tx = oxs.ldadam(
        rate(golden, h),
        by_name(of_rank(h, projected(golden), projector=projector)),
        weight_decay=h.get("weight_decay", 0.0),
        rho=h["rho"],
        error_feedback=h.one_of("error_feedback", YES_OR_NO),
        **adam(h),
    )
    h.check_all_read()

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        s = find(state, oxs.low_rank.LDAdamState)
        return {
            "projection_matrix": {leaf: p.T @ p for leaf, p in held(golden, s.bases).items()},
            "error": held(golden, s.error),
        }

    assert_run(golden, tx, look)
