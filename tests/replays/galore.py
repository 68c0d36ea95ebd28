"""GaLore with Adam or RMSProp inside, of matrices and of tensors."""

from typing import Any

import optax
from golden_files import Golden, Settings
from replays.low_rank import RecordedFactors, Specs, of_rank, projected, published, turned
from replays.running import adam, assert_run, by_name, find, held, rate

import optax_structured as oxs

YES_OR_NO = {True: True, False: False}


def adamw(golden: Golden) -> None:
    h = golden.settings()
    specs = published(golden, h)
    tx = with_adam(oxs.galore, golden, h, specs, h.get("scale", 1.0))

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        inner = find(state, optax.ScaleByAdamState)
        low = {key: turned(golden, specs, getattr(inner, key), "cols") for key in ("mu", "nu")}
        return bases(golden, specs, state) | low

    assert_run(golden, tx, look)


def rmsprop(golden: Golden) -> None:
    h = golden.settings()
    specs = published(golden, h)
    tx = with_rms(oxs.galore, golden, h, specs, h.get("scale", 1.0))
    assert_run(golden, tx, lambda state, _: bases(golden, specs, state))


def tucker(golden: Golden) -> None:
    h = golden.settings()
    found = golden.leaves("state/factor0")
    projector = RecordedFactors(golden=golden) if found else oxs.projectors.Tucker()
    parts = {"period": h["update_proj_gap"], "projector": projector, "transport": oxs.Keep()}
    specs = of_rank(h, projected(golden, lambda shape: len(shape) > 2), **parts)
    assert_run(golden, with_adam(oxs.galore, golden, h, specs, h.get("scale", 1.0)))


def with_adam(recipe: Any, golden: Golden, h: Settings, specs: Specs, scale: float) -> Any:
    """A recipe of this family with its own Adam, or with one that is not corrected."""
    settings = adam(h)
    if not h.one_of("correct_bias", YES_OR_NO, default=True):
        settings = {"inner": oxs.transforms.uncorrected_adam(**settings)}
    decay = h.get("weight_decay", 0.0)
    tx = recipe(rate(golden, h), by_name(specs), scale=scale, weight_decay=decay, **settings)
    h.check_all_read()
    return tx


def with_rms(recipe: Any, golden: Golden, h: Settings, specs: Specs, scale: float) -> Any:
    """A recipe of this family with RMSProp."""
    centered = h.one_of("centered", YES_OR_NO, default=False)
    rms = oxs.transforms.uncorrected_rms(
        h["beta"], h["eps"], h.get("momentum", 0.0), centered=centered
    )
    decay = h.get("weight_decay", 0.0)
    tx = recipe(rate(golden, h), by_name(specs), inner=rms, scale=scale, weight_decay=decay)
    h.check_all_read()
    return tx


def bases(golden: Golden, specs: Specs, state: Any) -> dict[str, dict[str, Any]]:
    """The bases in the layout of the files."""
    found = find(state, oxs.low_rank.LowRankState).bases
    if not golden.leaves("state/projector_left"):
        return {"projector": turned(golden, specs, found, "rows")}
    return {
        "projector_left": {leaf: both.left for leaf, both in held(golden, found).items()},
        "projector_right": {leaf: both.right.T for leaf, both in held(golden, found).items()},
    }
