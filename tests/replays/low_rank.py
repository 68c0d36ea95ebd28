"""Which leaves a file projected and how, for all systems with bases."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_files import Golden, Settings
from replays.running import held

import optax_structured as oxs
from optax_structured.projectors import OneSided, TwoSided
from optax_structured.projectors.two_sided import Sides

Specs = dict[str, oxs.LowRank]  # by leaf, of those that are projected

SIDES = {"std": "small", "reverse_std": "large", "left": "rows", "right": "cols", "full": "rows"}
# What files record of bases: it tells which leaves were projected.
BASES = (
    "projector",
    "projector_left",
    "proj_code",
    "factor0",
    "projection_matrix",
    "indices_sorted",
)


def projected(golden: Golden, wanted: Any = lambda shape: len(shape) == 2) -> list[str]:
    """The leaves with a recorded basis; where none is recorded, those of a wanted shape."""
    recorded = {leaf for key in BASES for leaf in golden.leaves(f"state/{key}")}
    return [
        leaf
        for leaf, x in golden.start.items()
        if (leaf in recorded if recorded else wanted(x.shape))
    ]


def of_rank(h: Settings, leaves: list[str], **parts: Any) -> Specs:
    """One record a leaf, with the one rank of the file or that of the leaf."""
    ranks = h["rank"] if isinstance(h["rank"], dict) else dict.fromkeys(leaves, h["rank"])
    tuples = {leaf: tuple(r) if isinstance(r, list) else r for leaf, r in ranks.items()}
    return {leaf: oxs.LowRank(tuples[leaf], **parts) for leaf in leaves}


def published(golden: Golden, h: Settings, **parts: Any) -> Specs:
    """GaLore's: from SVDs now and then, with moments that stay as they are."""
    axes = oxs.Axes(side=h.one_of("proj_type", SIDES, default="std"))
    both = h.get("proj_type") == "full"
    if signs_are_fixed(golden, axes):
        parts["projector"] = TwoSided() if both else oxs.SVD()
    else:
        parts["projector"] = RecordedSides(golden) if both else Recorded(golden)
    parts |= {"period": h["update_proj_gap"], "axes": axes, "transport": oxs.Keep()}
    return of_rank(h, projected(golden), **parts)


def turned(golden: Golden, specs: Specs, tree: dict[str, Any], side: str) -> dict[str, Any]:
    """The projected leaves of a state, transposed where this side is compressed.

    Files have bases as (rows, r) or (r, columns), and moments as (r, columns) or (rows, r); ours
    are (r, size) and (r, length) on either side.
    """

    def turn(leaf: str, x: jax.Array) -> jax.Array:
        return x.T if specs[leaf].axes.compressed_side(golden.start[leaf].shape) == side else x

    return {leaf: turn(leaf, x) for leaf, x in held(golden, tree).items() if leaf in specs}


def signs_are_fixed(golden: Golden, axes: oxs.Axes) -> bool:
    """Whether the largest entry of each recorded singular vector is positive.

    As moments stay across a refit, a run with other signs is another run.
    """

    def fixed(vectors: np.ndarray) -> bool:  # (steps, size, rank)
        largest = np.argmax(np.abs(vectors), axis=-2, keepdims=True)
        return bool(np.all(np.take_along_axis(vectors, largest, -2) >= 0))

    columns = list(golden.leaves("state/projector_left").values())
    rows = list(golden.leaves("state/projector_right").values())
    for leaf, bases in golden.leaves("state/projector").items():
        left = axes.compressed_side(golden.start[leaf].shape) == "rows"
        (columns if left else rows).append(bases)
    return all(map(fixed, columns)) and all(fixed(np.swapaxes(x, -1, -2)) for x in rows)


def recorded(golden: Golden, step: Any, key: str, size: int) -> jax.Array:
    """A recorded basis of `size` entries; leaf and step are told by the gradient."""
    bases, seen = [], []
    for leaf, steps in golden.leaves(f"state/{key}").items():
        if golden.leaves("grads")[leaf].shape[1:] == step.frame.shape and steps[0].size == size:
            bases.append(jnp.asarray(steps))
            seen.append(
                jax.vmap(step.frame.axes.to_matrix)(jnp.asarray(golden.leaves("grads")[leaf]))
            )
    same = jnp.all(jnp.concatenate(seen) == step.matrix, (-2, -1))
    return jnp.concatenate(bases)[jnp.argmax(same)]


@dataclasses.dataclass(frozen=True)
class Recorded(OneSided):
    """The bases that a run recorded, for a fit: signs as some LAPACK gave them."""

    golden: Golden

    def refit(self, step):
        new = recorded(self.golden, step, "projector", step.basis.size)
        return new.T if step.frame.side == "rows" else new, step.due


@dataclasses.dataclass(frozen=True)
class RecordedSides(TwoSided):
    """The same, on both sides."""

    golden: Golden

    def refit(self, step):
        left, right = (
            recorded(self.golden, step, f"projector_{side}", old.size)
            for side, old in zip(("left", "right"), step.basis, strict=True)
        )
        return Sides(left, right.T), step.due


@dataclasses.dataclass(frozen=True)
class RecordedFactors(oxs.projectors.Tucker):
    """The factors that a run recorded: another routine's signs, and where its sweeps stopped."""

    golden: Golden | None = None

    def refit(self, step):
        factors = (
            recorded(self.golden, step, f"factor{axis}", old.size)
            for axis, old in enumerate(step.basis)
        )
        return tuple(factors), step.due
