"""Projectors: where a low-rank leaf comes from."""

from optax_structured.low_rank.projectors.base import OneSided, Projector
from optax_structured.low_rank.projectors.dct import DCT
from optax_structured.low_rank.projectors.random import RandomProjection
from optax_structured.low_rank.projectors.randomized import RandomizedRange
from optax_structured.low_rank.projectors.subspace import SubspaceIteration
from optax_structured.low_rank.projectors.svd import SVD
from optax_structured.low_rank.projectors.tucker import Tucker
from optax_structured.low_rank.projectors.two_sided import TwoSided

__all__ = [
    "DCT",
    "SVD",
    "OneSided",
    "Projector",
    "RandomProjection",
    "RandomizedRange",
    "SubspaceIteration",
    "Tucker",
    "TwoSided",
]
