"""MADGRAD and MirrorMADGRAD."""

from golden_files import Golden
from replays.galore import YES_OR_NO
from replays.running import assert_run, rate

import optax_structured as oxs

RECIPES = {"madgrad": oxs.madgrad, "mirror_madgrad": oxs.mirror_madgrad}


def madgrad(golden: Golden) -> None:
    h = golden.settings()
    tx = RECIPES[golden.system](
        rate(golden, h),
        momentum=h["momentum"],
        eps=h["eps"],
        weight_decay=h.get("weight_decay", 0.0),
        decoupled=h.one_of("decouple_decay", YES_OR_NO, default=False),
    )
    h.check_all_read()
    assert_run(golden, tx, same_zeros=True)
