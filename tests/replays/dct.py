"""DCT-AdamW and Trion."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from golden_files import Golden
from replays.galore import YES_OR_NO
from replays.low_rank import of_rank, projected, turned
from replays.running import adam, assert_run, by_name, find, held, rate

import optax_structured as oxs

SCORES = {1: "l1", 2: "l2"}
KINDS = {"matmul": "dct3", "makhoul": "dct2"}


@dataclasses.dataclass(frozen=True)
class SixteenLevels:
    """The released "8-bit" quantiser of the error buffer: each row to 16 levels of its range."""

    def encode(self, x):
        low, high = (f(x, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
        scale = (high - low) / 15
        scale = jnp.where(scale == 0, 1, scale)
        return jnp.round((x - low) / scale), scale, low

    def decode(self, state):
        levels, scale, low = state
        return levels * scale + low


CODECS = {False: None, 8: SixteenLevels()}


def dct_adamw(golden: Golden) -> None:
    h = golden.settings()
    feedback, codec = h.one_of("use_ef", YES_OR_NO), h.one_of("q_ef", CODECS, default=False)
    longest = h.get("max_shape", 32000)
    parts = {
        "period": h["update_proj_gap"],
        "projector": oxs.DCT(
            score=h.one_of("ell_norm", SCORES, default=1), kind=h.one_of("sim_type", KINDS)
        ),
        "residual": oxs.ErrorFeedback(codec=codec) if feedback else oxs.low_rank.Drop(),
        "transport": oxs.Rotate() if h.one_of("rotate_subspace", YES_OR_NO) else oxs.Keep(),
    }
    leaves = projected(golden, lambda shape: len(shape) == 2 and max(shape) < longest)
    specs = of_rank(h, leaves, **parts)
    tx = oxs.dct_adamw(
        rate(golden, h),
        by_name(specs),
        weight_decay=h.get("weight_decay", 0.0),
        error_feedback=feedback,
        **adam(h),
    )
    h.check_all_read()

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        s, inner = (
            find(state, oxs.low_rank.LowRankState),
            find(state, oxs.transforms.DebiasedAdamState),
        )
        buffers = held(golden, s.residual)
        decoded = {leaf: codec.decode(x) if codec else x for leaf, x in buffers.items()}
        return {
            "indices_sorted": held(golden, s.bases),
            "mu_sorted": turned(golden, specs, inner.mu, "cols"),
            "nu_sorted": turned(golden, specs, inner.nu, "cols"),
            "error_feedback": decoded,
            "error_feedback_dequantised": decoded,
        }

    assert_run(golden, tx, look)


def trion(golden: Golden) -> None:
    h = golden.settings()
    kind = h.one_of("use_makhoul", {False: "matrix", True: "dct2"}, default=False)
    specs = of_rank(h, projected(golden), projector=oxs.DCT(kind=kind))
    iteration = oxs.transforms.orthogonalize(h["ns_steps"], tuple(h["ns_coefficients"]))
    tx = oxs.trion(
        rate(golden, h),
        by_name(specs),
        inner=iteration,
        momentum=h["mu"],
        weight_decay=h.get("weight_decay", 0.0),
        scaling=h["scaling_type"],
    )
    h.check_all_read()

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        s = find(state, oxs.low_rank.LowRankState)
        return {
            "indices_sorted": held(golden, s.bases),
            "momentum": held(golden, s.residual),
        }

    assert_run(golden, tx, look)
