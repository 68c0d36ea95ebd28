"""Ways to adapt the network, by name: what is trained of a kernel, and by which optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from optax_structured import adapters
from optax_structured.adapters import SNELL, Full, LoRA, SVFit
from optax_structured.recipes import prox_adam
from optax_structured.regularizers import GroupLasso
from optax_structured.training.names import check_known
from optax_structured.trees import Axes, Rules, rules

HEAD = "Dense_1"
_CONV = Axes(rows=(0, 1, 2), cols=3)


class Method(NamedTuple):
    """One way to adapt; the head is trained whole in all of them."""

    spec: Callable[[int, Axes], Any]  # of a kernel, from the rank and its axes
    build: Callable[[Any, float], optax.GradientTransformation]  # from learning rate and strength
    learning_rate: float
    biases: bool = False  # whether these are trained, too
    rank: int | None = 4
    strength: float = 0.0

    def takes(self, option: str) -> bool:
        """Whether this method has an option."""
        return option not in ("rank", "strength") or bool(getattr(self, option))


def _adam(rate: Any, strength: float) -> Any:
    return optax.adam(rate)


def _plus(rate: Any, strength: float) -> Any:
    return optax.chain(optax.adam(rate), adapters.scale_b(16.0))


def _pro(rate: Any, strength: float) -> Any:
    return optax.chain(adapters.lora_pro(), optax.adam(rate))


def _pro_published(rate: Any, strength: float) -> Any:
    return optax.chain(adapters.lora_pro(adapters.MinimumNorm()), optax.adam(rate))


def _pro_full(rate: Any, strength: float) -> Any:
    return adapters.lora_pro_full(optax.adam(rate))


def _prox(rate: Any, strength: float) -> Any:
    ranks = rules((HEAD, None), default=GroupLasso(group_axis=-1))
    return adapters.stack_pairs(prox_adam(rate, ranks, strength))


def _lora(rank: int, axes: Axes) -> Any:
    return LoRA(rank, axes=axes)


METHODS = {
    "full": Method(lambda rank, axes: Full(), _adam, 1e-3, biases=True, rank=None),
    "head": Method(lambda rank, axes: None, _adam, 1e-2, rank=None),
    "lora": Method(_lora, _adam, 1e-2),
    "lora_plus": Method(_lora, _plus, 1e-3),
    "lora_pro": Method(_lora, _pro, 1e-2),
    "lora_pro_published": Method(_lora, _pro_published, 1e-2),
    "lora_pro_full": Method(_lora, _pro_full, 1e-2),
    "lora_prox": Method(_lora, _prox, 1e-2, strength=1e-3),
    "svfit": Method(lambda rank, axes: SVFit(rank, axes=axes), _adam, 1e-1),
    "snell": Method(lambda rank, axes: SNELL(rank, 0.5, axes=axes), _adam, 1e-2),
}


def find(name: str) -> Method:
    """The method of this name.

    Raises:
      ValueError: there is none; lists them all, and the nearest.
    """
    check_known("recipe", name, METHODS)
    return METHODS[name]


def table(method: Method, rank: int) -> Rules:
    """Which weight of the network gets which adapter."""
    return rules(
        (HEAD, Full()),
        ("bias", Full() if method.biases else None),
        ("Conv", method.spec(rank, _CONV)),
        default=method.spec(rank, Axes()),
    )
