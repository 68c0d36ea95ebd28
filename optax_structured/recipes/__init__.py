"""Named optimizers: compositions of the elements, one family a file."""

from optax_structured.recipes.proximal import (
    prox_adam,
    prox_sgd,
    prox_sgd_relaxed,
    prox_ssi,
    ramda,
    rmda,
)

__all__ = ["prox_adam", "prox_sgd", "prox_sgd_relaxed", "prox_ssi", "ramda", "rmda"]
