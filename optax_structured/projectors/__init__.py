"""Projectors: where a low-rank leaf comes from."""

from optax_structured.projectors.base import OneSided, Projector, Refit, where_usable
from optax_structured.projectors.dct import DCT
from optax_structured.projectors.frames import Frame
from optax_structured.projectors.random import RandomProjection
from optax_structured.projectors.randomized import RandomizedRange
from optax_structured.projectors.subspace import SubspaceIteration
from optax_structured.projectors.svd import SVD
from optax_structured.projectors.tucker import Tucker
from optax_structured.projectors.two_sided import TwoSided

__all__ = [
    "DCT",
    "SVD",
    "Frame",
    "OneSided",
    "Projector",
    "Refit",
    "RandomProjection",
    "RandomizedRange",
    "SubspaceIteration",
    "Tucker",
    "TwoSided",
    "where_usable",
]
