"""The published runs, step by step: every file of `golden/` that belongs to one of these systems.

A replay takes all it needs from the file, so a file is added by putting it there.
"""

import pytest
from golden_files import load, names
from replays import (
    adafactor,
    codecs,
    dct,
    dual_averaging,
    eight_bits,
    fira,
    galore,
    grad_norm_lorp,
    ldadam,
    madgrad,
    prox_recipes,
    welore,
)

REPLAYS = {
    "adamw-8bit": eight_bits.eight_bits,
    "block-wise": codecs.dynamic,
    "dct-adamw": dct.dct_adamw,
    "fira-adamw": fira.adamw,
    "fira-rmsprop": fira.rmsprop,
    "galore-adafactor": adafactor.adafactor,
    "galore-adamw": galore.adamw,
    "galore-adamw-8bit": eight_bits.eight_bits,
    "galore-rmsprop": galore.rmsprop,
    "galore-tucker": galore.tucker,
    "group": codecs.affine,
    "grad_norm_lorp": grad_norm_lorp.grad_norm_lorp,
    "ldadamw": ldadam.ldadamw,
    "madgrad": madgrad.madgrad,
    "mirror_madgrad": madgrad.madgrad,
    "prox_adamw": prox_recipes.prox_adam,
    "prox_gen": prox_recipes.prox_adam,
    "prox_sgd": prox_recipes.prox_sgd,
    "prox_ssi": prox_recipes.prox_ssi,
    "q_galore": eight_bits.eight_bits,
    "ramda": dual_averaging.ramda,
    "rmda": dual_averaging.rmda,
    "trion": dct.trion,
    "welore": welore.welore,
}


def replayed():
    families = {system.partition("-")[0] + "-" for system in REPLAYS}
    return names("quant-", *families)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", replayed())
def test_published_run(name):
    golden = load(name)
    assert golden.system in REPLAYS, f"{name} says it is of the system {golden.system!r}"
    REPLAYS[golden.system](golden)
