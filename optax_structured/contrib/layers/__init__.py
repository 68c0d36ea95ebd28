"""Layers as pure functions; parameters and running statistics are arguments."""

from optax_structured.contrib.layers.delta_product import delta_product
from optax_structured.contrib.layers.spd_batch_norm import (
    SPDBatchNormParams,
    SPDStatistics,
    init_spd_batch_norm,
    spd_batch_norm,
    spd_descent,
)
from optax_structured.contrib.layers.spectral import (
    bures_wasserstein_distance,
    bures_wasserstein_exp,
    bures_wasserstein_geodesic,
    bures_wasserstein_mean_step,
    spd_power,
    spectral_product,
)

__all__ = [
    "SPDBatchNormParams",
    "SPDStatistics",
    "bures_wasserstein_distance",
    "bures_wasserstein_exp",
    "bures_wasserstein_geodesic",
    "bures_wasserstein_mean_step",
    "delta_product",
    "init_spd_batch_norm",
    "spd_batch_norm",
    "spd_descent",
    "spd_power",
    "spectral_product",
]
