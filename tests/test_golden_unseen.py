"""Settings that no public file has, against references in NumPy; names that could be mistaken."""

import pytest
from references import cosines, low_rank, proximal, tensors
from references.making import made
from test_golden import REPLAYS

# As hyperparameters, fields of states, patterns of rules, paths, indices and keys of states.
LEAVES = {
    "bias": (9, 6),
    "count": (5, 11),
    "enc/attn.kernel": (7, 7),
    "b1": (4,),
    "mu:0": (6, 8),
    "0": (),
}
WITHOUT_SCALARS = {leaf: shape for leaf, shape in LEAVES.items() if shape}
TENSORS = {"bias": (4, 3, 5), "mu": (2, 6, 3), "count": (5, 4), "0": (3,)}
LARGE = {"proj_type": "reverse_std"}
ONCE = {"update_proj_gap": 20, "rotate_subspace": False}
GALORE = {"rank": 3, "update_proj_gap": 3, "scale": 0.5, "lr": 0.02, "weight_decay": 0.1}
ADAM = {"betas": [0.8, 0.95], "eps": 1e-7}
RMS = {"beta": 0.9, "eps": 1e-6, "momentum": 0.4, "centered": True}
TUCKER = GALORE | ADAM | {"rank": [2, 2, 2]}
FACTORED = GALORE | {
    "lr": None,
    "eps": [1e-30, 1e-3],
    "clip_threshold": 0.7,
    "decay_rate": -0.8,
    "beta1": None,
    "relative_step": True,
    "warmup_init": True,
    "scale_parameter": True,
}
FIRA = {"alpha": 0.3, "limiter_gamma": 1.05, "limiter_eps": 1e-8, "scale_eps": 1e-8}
FIRA |= {key: GALORE[key] for key in ("rank", "update_proj_gap", "lr", "weight_decay")}
DCT = {"rank": 3, "update_proj_gap": 2, "lr": 0.02, "weight_decay": 0.1, "ell_norm": 2, **ADAM}
DCT |= {"use_ef": True, "q_ef": False, "rotate_subspace": True, "sim_type": "makhoul"}
TRION = {"rank": 3, "mu": 0.8, "lr": 0.02, "weight_decay": 0.1, "scaling_type": "dion"}
TRION |= {"use_makhoul": True, "ns_steps": 3, "ns_coefficients": [3.0, -4.0, 2.0]}
LDADAM = {"rank": 3, "lr": 0.02, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.1, "rho": 0.7}
LDADAM |= {"error_feedback": True, "proj_method": "svd"}

LOW_RANK = {
    "galore-adamw-uncorrected": (low_rank.galore, GALORE | ADAM | {"correct_bias": False}),
    "galore-adamw-whole": (low_rank.galore, GALORE | ADAM | LARGE | {"rank": 20}),
    "galore-adamw-both_sides": (low_rank.galore, GALORE | ADAM | {"proj_type": "full"}),
    "galore-adamw-raw_signs": (low_rank.with_raw_signs, GALORE | ADAM),
    "galore-adamw-raw_sides": (low_rank.with_raw_signs, GALORE | ADAM | {"proj_type": "full"}),
    "galore-rmsprop-centered": (low_rank.galore_rmsprop, GALORE | RMS),
    "galore-adafactor-warmup": (low_rank.adafactor, FACTORED),
    "galore-adafactor-momentum": (low_rank.adafactor, FACTORED | LARGE | {"beta1": 0.8}),
    "galore-tucker-uncorrected": (tensors.tucker, TUCKER | {"correct_bias": False}),
    "fira-adamw-right": (low_rank.fira, FIRA | ADAM | {"proj_type": "right"}),
    "fira-adamw-whole": (low_rank.fira, FIRA | ADAM | {"alpha": 1.0, "rank": 20}),
    "fira-rmsprop-centered": (low_rank.fira_rmsprop, FIRA | RMS | LARGE),
    "dct-adamw-makhoul-ell2": (cosines.dct_adamw, DCT),
    "dct-adamw-chosen_once": (cosines.dct_adamw, DCT | ONCE),
    "trion-makhoul": (cosines.trion, TRION),
    "grad_norm_lorp-large": (low_rank.grad_norm_lorp, GALORE | ADAM | LARGE),
    "grad_norm_lorp-as_meant": (low_rank.weight_norm, GALORE | ADAM | {"mode": "weight_norm"}),
    "ldadamw-ef-svd": (low_rank.ldadamw, LDADAM),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank(name):
    run, settings = LOW_RANK[name]
    leaves = {"galore-tucker": TENSORS, "grad_norm_lorp": WITHOUT_SCALARS}.get(system(name), LEAVES)
    replay(name, run, settings, leaves)


def system(name):
    return next(system for system in REPLAYS if name.startswith(system + "-"))


def replay(name, run, settings, leaves, **meta):
    REPLAYS[system(name)](made(name, system(name), run, leaves, settings, **meta))


GROUPS = (
    "matrices are (out, in), convolutions (out, in, kh, kw). Regularised leaves: ndim 2 and 4. "
    "Group lasso: one group per input index (axis 1), group weight sqrt(number of entries)."
)
WEIGHTS = {
    "bias": (9, 6),
    "count/conv.weight": (4, 5, 3, 2),
    "mu": (3, 8),
    "anchor": (5,),
    "0": (),
    "scan": (2, 3, 4),
}
STAGED = {"gamma": 0.2, "milestones_epochs": [1, 2], "steps_per_epoch": 2}
EARLY = {"momentum_growth_start": "early"}
RAMDA = {"lr": 0.05, "momentum": 0.4, "lambda_": 0.3, "epsilon": 1e-4, "regularizer": "group_lasso"}
RMDA = {"lr": 0.3, "momentum": 0.4, "lambda_": 0.3, "regularizer": "group_lasso"}
LIMITED = {"max_iters": 30, "rtol": 1e-6}
PROX_ADAM = {"lr": 0.05, "betas": [0.8, 0.95], "epsilon": 1e-3, "weight_decay": 0.3}
PROX_ADAM |= {"lambda_": 0.2, "regularizer": "group_lasso"}
PROX_GEN = {k: v for k, v in PROX_ADAM.items() if k != "lambda_"} | {"penalty": 0.2}
SSI = {"lr": 0.05, "betas": [0.8, 0.95], "epsilon": 1e-2, "weight_decay": 0.3, "lambda_": 0.1}
SSI |= {"correct_bias": True, "penalty": "l1_l2"}
YANG = {"epsilon": 0.5, "epsilon_decay": 0.6, "rho": 0.8, "rho_decay": 0.4, "step_offset": 2}
YANG |= {"beta": 0.9, "delta": 1e-6, "mu": 0.2, "clip_bounds": [-0.8, 0.7]}

PROXIMAL = {
    "ramda-stages": (proximal.ramda, RAMDA | STAGED),
    "ramda-stages_early": (proximal.ramda, RAMDA | STAGED | EARLY),
    "ramda-pg": (proximal.ramda, RAMDA | LIMITED),
    "ramda-l1": (proximal.ramda, RAMDA | {"regularizer": "l1"}),
    "rmda-stages": (proximal.rmda, RMDA | STAGED),
    "prox_sgd-stages": (proximal.prox_sgd, RMDA | STAGED),
    "prox_sgd-relaxed_box": (proximal.prox_sgd_relaxed, YANG),
    "prox_adamw-amsgrad_stages": (proximal.prox_adamw, PROX_ADAM | STAGED | {"amsgrad": True}),
    "prox_adamw-pg_decay": (proximal.prox_adamw, PROX_ADAM | LIMITED),
    "prox_gen-l0": (proximal.prox_adamw, PROX_GEN | {"regularizer": "l0"}),
    "prox_ssi-l1_l2_decay": (proximal.prox_ssi, SSI),
    "prox_ssi-uncorrected": (proximal.prox_ssi, SSI | {"correct_bias": False}),
    "prox_ssi-group_mcp_decay": (proximal.prox_ssi, SSI | {"penalty": "group_mcp", "gamma": 6.0}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PROXIMAL)
def test_proximal(name):
    layout = "elementwise, every leaf" if "relaxed" in name else GROUPS
    replay(name, *PROXIMAL[name], WEIGHTS, layout=layout)
