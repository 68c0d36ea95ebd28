"""Ways to adapt a network, by name: what is trained of a kernel, and by which optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from optax_structured import adapters
from optax_structured.adapters import SNELL, SNELLA, Full, LoRA, SVFit
from optax_structured.low_rank import LowRank
from optax_structured.proximal import prox_step
from optax_structured.recipes import apollo, galore
from optax_structured.regularizers import GroupLasso
from optax_structured.trees import Axes, Rules, rules

_SPARSITY = 0.5  # of SNELL, and of SNELLA in the end


class Start(NamedTuple):
    """Where a method starts on some data."""

    learning_rate: float
    rank: int | None = None
    strength: float = 0.0


class Method(NamedTuple):
    """One way to adapt; the head is trained whole in all of them, with a rate of its own."""

    spec: Callable[[int, Axes], Any]  # of a kernel, from the rank and its axes
    build: Callable[[Any, "Setting"], optax.GradientTransformation]  # from the learning rate
    starts: dict[str, Start]  # by the name of the data
    watcher: Callable[["Setting"], Any] | None = None  # a `Perturbation` or a `SparsityAllocator`

    def takes(self, option: str) -> bool:
        """Whether this method has an option."""
        own = ("rank", "strength")
        return option not in own or any(getattr(start, option) for start in self.starts.values())


class Setting(NamedTuple):
    """What a method is built with beside its learning rate."""

    rank: int
    strength: float
    steps: int  # of the run
    kernels: dict[str, Axes]  # of the network: pattern and axes


def _starts(
    digits: float,
    verses: float,
    ranks: tuple[int, int] | tuple[None, None] = (4, 8),
    strengths: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Start]:
    return {
        "digits": Start(digits, ranks[0], strengths[0]),
        "verses": Start(verses, ranks[1], strengths[1]),
    }


def _adam(rate: Any, setting: Setting) -> Any:
    return optax.adam(rate)


def _plus(rate: Any, setting: Setting) -> Any:
    return optax.chain(optax.adam(rate), adapters.scale_b(16.0))


def _pro(*solver: Any) -> Callable[[Any, Setting], Any]:
    return lambda rate, _: optax.chain(adapters.lora_pro(*solver), optax.adam(rate))


def _pro_full(rate: Any, setting: Setting) -> Any:
    return adapters.lora_pro_full(optax.adam(rate))


def _prox(rate: Any, setting: Setting) -> Any:
    penalty = prox_step(GroupLasso(group_axis=-1), setting.strength, weight=rate)
    return adapters.stack_pairs(optax.chain(optax.adam(rate), penalty))


def _low_rank(recipe: Callable[..., Any]) -> Callable[[Any, Setting], Any]:
    def build(rate: Any, setting: Setting) -> Any:
        specs = [
            (pattern, LowRank(setting.rank, period=50, axes=axes))
            for pattern, axes in setting.kernels.items()
        ]
        return recipe(rate, rules(*specs, default=None))

    return build


def _lora(rank: int, axes: Axes) -> Any:
    return LoRA(rank, axes=axes)


def _full(rank: int, axes: Axes) -> Any:
    return Full()


_MGPO = adapters.MGPO(rho=0.05)
_GGPO = adapters.GGPO(sigma=0.03, beta=0.01, cap=1.0)


def _allocator(setting: Setting) -> Any:
    return adapters.SparsityAllocator(total=setting.steps, target=_SPARSITY, interval=10)


METHODS = {
    "full": Method(_full, _adam, _starts(1e-3, 1e-4, (None, None))),
    "head": Method(lambda rank, axes: None, _adam, _starts(1e-2, 2e-2, (None, None))),
    "lora": Method(_lora, _adam, _starts(1e-2, 2e-3)),
    "lora_plus": Method(_lora, _plus, _starts(1e-3, 5e-4)),
    "lora_pro": Method(_lora, _pro(), _starts(1e-2, 2e-3)),
    "lora_pro_published": Method(_lora, _pro(adapters.MinimumNorm()), _starts(1e-2, 2e-3)),
    "lora_pro_full": Method(_lora, _pro_full, _starts(1e-2, 5e-4)),
    "mgpo": Method(_lora, _adam, _starts(1e-2, 2e-3), lambda _: _MGPO),
    "ggpo": Method(_lora, _adam, _starts(1e-2, 2e-3), lambda _: _GGPO),
    "lora_prox": Method(_lora, _prox, _starts(3e-2, 2e-3, strengths=(0.05, 0.2))),
    "svfit": Method(
        lambda rank, axes: SVFit(rank, axes=axes), _adam, _starts(1e-1, 2e-2, (8, 256))
    ),
    "snell": Method(
        lambda rank, axes: SNELL(rank, _SPARSITY, axes=axes), _adam, _starts(1e-2, 1e-2)
    ),
    "snella": Method(
        lambda rank, axes: SNELLA(rank, axes=axes), _adam, _starts(1e-2, 1e-2), _allocator
    ),
    "galore": Method(_full, _low_rank(galore), _starts(1e-2, 4e-4)),
    "apollo": Method(_full, _low_rank(apollo), _starts(3e-3, 1e-4)),
}


def table(method: Method, rank: int, head: str, kernels: dict[str, Axes]) -> Rules:
    """Which weight of the network gets which adapter."""
    specs = ((pattern, method.spec(rank, axes)) for pattern, axes in kernels.items())
    return rules((head, Full()), *specs, default=None)
