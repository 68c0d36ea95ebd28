"""MGPO: perturbations along the momentum of the gradient."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.adapters.lora import Pair, with_factors
from optax_structured.adapters.perturbation import (
    Perturbation,
    add_to_weights,
    first_order,
    pairs_of,
)
from optax_structured.trees.checks import check_nonnegative, check_positive
from optax_structured.trees.precision import at_least_float32

_TINY = 1e-12


class MGPOState(NamedTuple):
    """State of `MGPO`."""

    momentum: dict[str, Pair]  # of the gradients of the factors, by path
    norm: dict[str, jax.Array]  # () each, by path: running norm of the gradient; 0 before the first


@dataclasses.dataclass(frozen=True)
class MGPO(Perturbation):
    r"""A step along the momentum before each gradient: flat minima without a second gradient.

    .. math:: \epsilon_t = \pm \rho\, \frac{m_{t-1}}{\|m_{t-1}\|} \cdot \frac{1}{\bar g_{t-1}},
        \qquad m_t = \mu m_{t-1} + g_t, \qquad
        \bar g_t = \beta \bar g_{t-1} + (1 - \beta) \|g_t\|

    The first step has no perturbation. The perturbation is **not** invariant to the scale of the
    loss: with losses of large gradients it vanishes.

    Args:
      rho: :math:`\rho`, at least 0; 0.01 to 0.05.
      momentum: :math:`\mu`, in [0, 1); 0.8 to 0.9, as b1 of Adam.
      beta: :math:`\beta`, in [0, 1); 0.8 to 0.9.
      sign: +1 as in the paper, an ascent step as in SAM; -1 as in the authors' code, a look-ahead.
      space: `"factors"` as in the paper, or `"weights"` as in the code, where m and g are
        :math:`s (b\, x_A + x_B\, a)`.
      norm: `"global"` over all pairs as in the paper, or `"per_leaf"` as in the code.
      max_multiplier: limit of :math:`1 / \bar g`; 10 in the code, None in the paper.

    Raises:
      ValueError: a number or word out of range, or an adapter without `Pair`.

    Equals plain training where rho = 0; the ascent point of SAM where the momentum is the present
    gradient and its norm 1.

    Example: see `perturbed_value_and_grad`.
      >>> import optax_structured as oxs
      >>> as_released = oxs.adapters.MGPO(
      ...     0.05, sign=-1, space="weights", norm="per_leaf", max_multiplier=10.0)

    Reference: Chang et al., `LoRA-MGPO <https://arxiv.org/abs/2502.14538>`_, 2025. Paper and code
    differ in sign, space, norm and limit; which of them made the tables is not known. The first
    norm starts the running one, which the paper leaves open.
    """

    rho: float = 0.05
    momentum: float = 0.9
    beta: float = 0.9
    sign: Literal[1, -1] = 1
    space: Literal["factors", "weights"] = "factors"
    norm: Literal["global", "per_leaf"] = "global"
    max_multiplier: float | None = None

    def __post_init__(self) -> None:
        check_nonnegative("rho", self.rho)
        for name in ("momentum", "beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"MGPO({name}=...) is in [0, 1), got {getattr(self, name)!r}")
        choices = {"sign": (1, -1), "space": ("factors", "weights"), "norm": ("global", "per_leaf")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"MGPO({name}=...) is one of {known[0]!r} and {known[1]!r}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.max_multiplier is not None:
            check_positive("max_multiplier", self.max_multiplier)

    def init(self, params: Any, adapter: Mapping[str, Any]) -> MGPOState:
        pairs = pairs_of("MGPO", adapter)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), pairs)
        return MGPOState(zeros, {path: jnp.zeros((), pair.a.dtype) for path, pair in zeros.items()})

    def apply(
        self, state: MGPOState, params: Any, adapter: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        pairs = pairs_of("MGPO", adapter)
        direction = {path: self._seen(pair, state.momentum[path]) for path, pair in pairs.items()}
        norms = self._norms(direction)
        lengths = {path: self._length(state, norms, path) for path in pairs}
        step = {path: optax.tree.scale(lengths[path], x) for path, x in direction.items()}
        if self.space == "weights":
            return add_to_weights(params, step, pairs), adapter
        moved = {
            path: with_factors(pair, pair.a + step[path].a, pair.b + step[path].b)
            for path, pair in pairs.items()
        }
        return params, {**adapter, **moved}

    def observe(self, state: MGPOState, adapter: Mapping[str, Any], gradient: Any) -> MGPOState:
        pairs = pairs_of("MGPO", adapter)
        new = self._norms({path: self._seen(pair, gradient[path]) for path, pair in pairs.items()})

        def averaged(old: jax.Array, norm: jax.Array) -> jax.Array:
            return jnp.where(old == 0.0, norm, self.beta * old + (1 - self.beta) * norm)

        momentum = {
            path: jax.tree.map(lambda m, g: self.momentum * m + g, old, gradient[path])
            for path, old in state.momentum.items()
        }
        return MGPOState(momentum, {path: averaged(state.norm[path], new[path]) for path in pairs})

    def _length(self, state: MGPOState, norms: Mapping[str, Any], path: str) -> jax.Array:
        """What the direction of one weight is multiplied by."""
        size, mean = norms[path], state.norm[path]
        multiplier = 1 / jnp.where(mean == 0.0, 1.0, mean + _TINY)
        if self.max_multiplier is not None:
            multiplier = jnp.minimum(multiplier, self.max_multiplier)
        length = self.sign * self.rho * multiplier / jnp.where(size > _TINY, size + _TINY, 1.0)
        return jnp.where((size > _TINY) & (mean > 0.0), length, 0.0)

    def _seen(self, pair: Pair, x: Pair) -> Any:
        """A direction of the factors in the space of the perturbation."""
        return first_order(pair, x.a, x.b) if self.space == "weights" else x

    def _norms(self, tree: Mapping[str, Any]) -> dict[str, jax.Array]:
        if self.norm == "per_leaf":
            return {path: optax.tree.norm(x) for path, x in tree.items()}
        return dict.fromkeys(tree, optax.tree.norm(tree))
