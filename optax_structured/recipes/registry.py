"""The named optimizers, one entry each: command, planner, byte formulas, pages and tests read it.

A new recipe joins by adding an entry to `RECIPES`.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import optax

from optax_structured import recipes
from optax_structured.quantization import Affine
from optax_structured.recipes.state_numbers import Formula, Numbers


class Range(NamedTuple):
    """What a scalar may be."""

    expected: str  # as its error says it
    refused: tuple[float, ...]  # examples of what it may not be


AT_LEAST_ZERO = Range("a finite number of at least 0", (-1e-6, float("nan"), float("inf")))
ABOVE_ZERO = Range("a finite number above 0", (0.0, -1e-6, float("nan"), float("inf")))
FRACTION = Range("in [0, 1)", (1.0, -0.1, float("nan")))

# Every argument of a recipe that a schedule may drive.
SCALARS: Mapping[str, Range] = MappingProxyType(
    {
        **dict.fromkeys(("learning_rate", "adam_learning_rate", "strength"), AT_LEAST_ZERO),
        **dict.fromkeys(("weight_decay", "l2", "scale", "eps"), AT_LEAST_ZERO),
        **dict.fromkeys(("momentum", "b1", "b2", "rho"), FRACTION),
    }
)


class TextRun(NamedTuple):
    """What a run of the task `lm` starts from."""

    learning_rate: float
    scale: float | None = None  # of the low-rank part of the update; None: the recipe has none
    rank: int | None = None  # None: a quarter of the model's width
    period: int | None = 50  # steps from one refit of the bases to the next; None: full rank
    codec: Affine | None = None  # of the bases

    def takes(self, option: str) -> bool:
        """Whether the recipe has an option, and has it open."""
        if option == "scale":
            return self.scale is not None
        if option in ("projector", "refresh", "transport"):
            return self.period is not None
        fixed = {
            "rank": self.rank is not None or self.period is None,
            "period": self.period in (None, 1),
        }
        return not fixed.get(option, False)


class ImageRun(NamedTuple):
    """What a run of the task `images` starts from."""

    learning_rate: float
    strength: float
    momentum: float  # b1 of the recipes of Adam's family
    eps: float  # 0: the recipe has none

    def takes(self, option: str) -> bool:
        """Whether the recipe has an option."""
        return option not in ("strength", "eps") or getattr(self, option) > 0


class Recipe(NamedTuple):
    """One named optimizer.

    The image runs are the published ones: logistic regression on MNIST with the group lasso, and an
    MLP on Fashion-MNIST with the nuclear norm.
    """

    make: Callable[..., Any]
    family: Literal["plain", "proximal", "low_rank"]
    purpose: str  # what to take it for
    paper: str
    numbers: Formula | None = None  # of its state, of one matrix; None: copies of the parameters
    ranges: Mapping[str, Range] = MappingProxyType({})  # of scalars, where not those of `SCALARS`
    state_bits: int = 32  # of a moment, as published
    text: TextRun | None = None
    images: ImageRun | None = None
    nuclear: ImageRun | None = None
    averages: bool = False  # the parameters average prox points, and are structured at the end only

    def takes(self, argument: str) -> bool:
        """Whether `make` has an argument of this name."""
        return argument in inspect.signature(self.make).parameters

    @property
    def scalars(self) -> dict[str, Range]:
        """The scalars that it takes, and what they may be."""
        return {n: self.ranges.get(n, r) for n, r in SCALARS.items() if self.takes(n)}


_POSITIVE_EPS = {"eps": ABOVE_ZERO}
_ARXIV = "https://arxiv.org/abs/"

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "adamw": Recipe(
            optax.adamw,
            "plain",
            "what everything here is compared with",
            _ARXIV + "1711.05101",
            lambda x: Numbers(2 * x.entries),
            text=TextRun(3e-3, period=None),
            images=ImageRun(1e-3, 0.0, 0.9, 1e-8),
        ),
        "diffgrad": Recipe(
            recipes.diffgrad,
            "plain",
            "Adam with less step where the gradient stopped changing",
            _ARXIV + "1909.11015",
            lambda x: Numbers(3 * x.entries),
            text=TextRun(3e-3, period=None),
        ),
        "madgrad": Recipe(
            recipes.madgrad,
            "plain",
            "dual averaging with a cube root: `ramda` without regularizer",
            _ARXIV + "2101.11075",
            text=TextRun(3e-3, period=None),
        ),
        "mirror_madgrad": Recipe(
            recipes.mirror_madgrad,
            "plain",
            "MADGRAD by mirror descent: steps of fine-tuning",
            _ARXIV + "2101.11075",
            text=TextRun(1e-3, period=None),
        ),
        "ramda": Recipe(
            recipes.ramda,
            "proximal",
            "structure that stays, adaptive rates",
            _ARXIV + "2403.14398",
            ranges=_POSITIVE_EPS,
            images=ImageRun(1e-2, 1e-3, 0.99, 1e-6),
            nuclear=ImageRun(1e-2, 1e-3, 0.9, 1e-6),
            averages=True,
        ),
        "rmda": Recipe(
            recipes.rmda,
            "proximal",
            "structure that stays, rates as of SGD",
            _ARXIV + "2112.02612",
            images=ImageRun(0.1, 1e-3, 0.9, 0.0),
            nuclear=ImageRun(0.1, 5e-3, 0.9, 0.0),
            averages=True,
        ),
        "prox_sgd": Recipe(
            recipes.prox_sgd,
            "proximal",
            "proximal SGD with momentum",
            _ARXIV + "2403.14398",
            images=ImageRun(0.1, 1e-3, 0.9, 0.0),
            nuclear=ImageRun(0.1, 5e-3, 0.9, 0.0),
        ),
        "prox_sgd_relaxed": Recipe(
            recipes.prox_sgd_relaxed,
            "proximal",
            "ProxSGD as first published, with a relaxed step",
            "https://openreview.net/forum?id=HygpthEtvr",
            ranges=_POSITIVE_EPS,
        ),
        "prox_adam": Recipe(
            recipes.prox_adam,
            "proximal",
            "Adam with an exact prox in Adam's own metric",
            _ARXIV + "2007.07484",
            ranges=_POSITIVE_EPS,
            images=ImageRun(1e-3, 1e-3, 0.9, 1e-8),
            nuclear=ImageRun(1e-3, 3.5e-3, 0.9, 1e-8),
        ),
        "prox_ssi": Recipe(
            recipes.prox_ssi,
            "proximal",
            "Adam with whole groups to zero and unbiased living ones (`GroupMCP`)",
            _ARXIV + "2102.03869",
            ranges=_POSITIVE_EPS,
            images=ImageRun(1e-3, 1e-3, 0.9, 1e-6),
            nuclear=ImageRun(1e-3, 3.5e-3, 0.9, 1e-6),
        ),
        "galore": Recipe(
            recipes.galore,
            "low_rank",
            "Adam, or any optimizer, in a refitted subspace",
            _ARXIV + "2403.03507",
            lambda x: Numbers(x.moments, x.basis),
            text=TextRun(1e-2, scale=0.25),
        ),
        "q_galore": Recipe(
            recipes.q_galore,
            "low_rank",
            "`galore` with moments in 8 bits, bases in 4, weights in 8",
            _ARXIV + "2407.08296",
            lambda x: Numbers(x.moments, x.basis),
            state_bits=8,
            text=TextRun(1.5e-2, scale=0.25, codec=Affine(bits=4)),
        ),
        "fira": Recipe(
            recipes.fira,
            "low_rank",
            "`galore` with what the subspace leaves out, in its step sizes",
            _ARXIV + "2410.01623",
            lambda x: Numbers(x.moments, x.basis, 1),  # one norm of the limiter
            text=TextRun(1e-2, scale=0.25),
        ),
        "apollo": Recipe(
            recipes.apollo,
            "low_rank",
            "no stored basis: random projections set the step sizes",
            _ARXIV + "2412.05270",
            lambda x: Numbers(x.moments, 0, 2),  # a seed, and a norm of the limiter
            text=TextRun(1e-2, scale=1.0),
        ),
        "apollo_mini": Recipe(
            recipes.apollo_mini,
            "low_rank",
            "the memory of SGD: `apollo` of rank 1",
            _ARXIV + "2412.05270",
            lambda x: Numbers(2 * x.length, 0, 2),
            text=TextRun(1e-2, scale=128**0.5, rank=1),
        ),
        # Error buffers are counted: in JAX no gradient buffer can hold them.
        "dct_adamw": Recipe(
            recipes.dct_adamw,
            "low_rank",
            "no decomposition: columns of a cosine transform, chosen at each step",
            _ARXIV + "2505.17967",
            lambda x: Numbers(x.moments, 0, x.rank + x.entries),
            text=TextRun(3e-3, period=1),
        ),
        "trion": Recipe(
            recipes.trion,
            "low_rank",
            "orthogonalized momentum in columns of a cosine transform",
            _ARXIV + "2505.17967",
            lambda x: Numbers(0, 0, x.rank + x.entries),
            text=TextRun(2e-2, period=1),
        ),
        "ldadam": Recipe(
            recipes.ldadam,
            "low_rank",
            "a subspace that follows each gradient, with error feedback",
            _ARXIV + "2410.16103",
            lambda x: Numbers(x.moments, x.basis, x.entries),
            text=TextRun(3e-3, period=1),
        ),
        "grad_norm_lorp": Recipe(
            recipes.grad_norm_lorp,
            "low_rank",
            "normalized weights, their directions in low rank",
            _ARXIV + "2412.19616",
            lambda x: Numbers(x.moments, x.basis, 2 * x.rows),
            text=TextRun(1e-2, scale=0.25),
        ),
    }
)
