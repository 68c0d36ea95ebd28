"""Named optimizers: compositions of the elements, one family a file."""

from optax_structured.recipes.dct import dct_adamw, trion
from optax_structured.recipes.diffgrad import diffgrad
from optax_structured.recipes.dual_averaging import ramda, rmda
from optax_structured.recipes.end_of_chain import check_nothing_follows
from optax_structured.recipes.fira import apollo, apollo_mini, fira
from optax_structured.recipes.galore import galore
from optax_structured.recipes.grad_norm_lorp import grad_norm_lorp
from optax_structured.recipes.ldadam import ldadam
from optax_structured.recipes.madgrad import madgrad, mirror_madgrad
from optax_structured.recipes.prox_adam import prox_adam, prox_ssi
from optax_structured.recipes.prox_sgd import prox_sgd, prox_sgd_relaxed
from optax_structured.recipes.q_galore import q_galore

__all__ = [
    "apollo",
    "apollo_mini",
    "check_nothing_follows",
    "dct_adamw",
    "diffgrad",
    "fira",
    "galore",
    "grad_norm_lorp",
    "ldadam",
    "madgrad",
    "mirror_madgrad",
    "prox_adam",
    "prox_sgd",
    "prox_sgd_relaxed",
    "prox_ssi",
    "q_galore",
    "ramda",
    "rmda",
    "trion",
]
