"""The published runs, step by step: every file of `golden/` that belongs to one of these systems.

A replay takes all it needs from the file, so a file is added by putting it there.
"""

import dataclasses

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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name, change, message",
    [
        ("galore-adamw-std", {"dropout": 0.1}, "says dropout=0.1, which its replay does not read"),
        ("galore-adamw-std", {"proj_type": "up"}, "proj_type='up', .* it knows 'std', "),
        ("fira-adamw-alpha1", {"scale_eps": 1e-6}, "scale_eps=1e-06, .* it knows 1e-08"),
        ("rmda-l1", {"regularizer": "l7"}, "has the regularizer 'l7', which no replay knows"),
        ("rmda-stages2021", {"gamma": 0.5}, "as no published rule makes it"),
        ("ldadamw-ef", {"rho": None}, "has no setting 'rho', which its replay needs"),
    ],
)
def test_a_setting_without_meaning_is_an_error(name, change, message):
    golden = load(name)
    meta = golden.meta | {"hyperparameters": golden.hyperparameters | change}
    with pytest.raises((KeyError, ValueError), match=message):
        REPLAYS[golden.system](dataclasses.replace(golden, meta=meta))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("key", ["params/vector", "state/projector/wide", "state/v_col/tall"])
def test_another_number_is_seen(key):
    golden = load("galore-adafactor-relative")
    changed = golden.arrays | {key: (1 + 1e-6) * golden.arrays[key]}
    with pytest.raises(AssertionError, match=f"{key} after step 1"):
        REPLAYS[golden.system](dataclasses.replace(golden, arrays=changed))
