"""What a network is worth: before training, by its gradients in the input, and unit by unit."""

from optax_structured.contrib.scores.boosting import BoostedNetwork, fit_boosted_network
from optax_structured.contrib.scores.boosting_losses import BoostingLoss, boosting_loss
from optax_structured.contrib.scores.diffroar import (
    DiffROAR,
    block_images,
    diffroar,
    mask_dataset,
    null_share,
    rank_by_input_gradient,
)
from optax_structured.contrib.scores.gradsign import GradSign, gradsign

__all__ = [
    "BoostedNetwork",
    "BoostingLoss",
    "DiffROAR",
    "GradSign",
    "block_images",
    "boosting_loss",
    "diffroar",
    "fit_boosted_network",
    "gradsign",
    "mask_dataset",
    "null_share",
    "rank_by_input_gradient",
]
