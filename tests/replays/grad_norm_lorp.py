"""GradNormLoRP, as released or as meant."""

from typing import Any

import jax
import jax.numpy as jnp
from golden_files import Golden
from replays.galore import bases
from replays.low_rank import published
from replays.running import adam, assert_run, by_name, find, rate

import optax_structured as oxs


def grad_norm_lorp(golden: Golden) -> None:
    h = golden.settings()
    specs = published(golden, h)
    mode = h.get("mode", "lookahead")
    tx = oxs.grad_norm_lorp(
        rate(golden, h),
        by_name(specs),
        scale=h.get("scale", 1.0),
        weight_decay=h.get("weight_decay", 0.0),
        mode=mode,
        **adam(h),
    )
    h.check_all_read()

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        lengths = jax.tree.map(lambda w: jnp.linalg.norm(w, axis=-1, keepdims=True), current)
        copies = {"v": find(state, oxs.transforms.LookaheadState).v} if mode == "lookahead" else {}
        return bases(golden, specs, state) | {"g": lengths} | copies

    assert_run(golden, tx, look)
