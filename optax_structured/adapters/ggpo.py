"""GGPO: random perturbations of the weights, scaled by row."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.adapters.perturbation import (
    Perturbation,
    add_to_weights,
    first_order,
    pairs_of,
)
from optax_structured.meshes import placement
from optax_structured.trees import named_leaves
from optax_structured.trees.checks import check_nonnegative, check_positive
from optax_structured.trees.precision import at_least_float32


class RowNorms(NamedTuple):
    """What the noise of one weight is scaled by, a row for each output."""

    base: jax.Array  # (*batch, 1, 1): mean norm of the rows of the frozen weight
    weight: jax.Array  # (*batch, m, 1): with the product of the factors; after each step
    gradient: jax.Array  # (*batch, m, 1): of s (b gA + gB a); zero before the first step


class GGPOState(NamedTuple):
    """State of `GGPO`."""

    rows: dict[str, RowNorms]  # by path
    key: jax.Array  # () typed key: each step and each weight fold in their own number
    step: jax.Array  # () int32: steps since init


@dataclasses.dataclass(frozen=True)
class GGPO(Perturbation):
    r"""Noise on each adapted weight, larger for rows of large weights and of large gradients.

    .. math:: E_{ij} = \frac{\sigma w_i + \beta g_i^2}{\sqrt m} Z_{ij}, \qquad
        w_i^2 = \bar w_0^2 + \|(b a)_i\|^2, \qquad g_i = \|s (b g_A + g_B a)_i\|

    with Z standard normal, m outputs, and norms of the step before; the first step has none.
    With :math:`\beta = 0` it is Flat-LoRA's noise. `combine="quadrature"` is
    :math:`\sqrt{\sigma^2 w_i^2 + \beta^2 g_i^2} / \sqrt m`.

    The square of the gradient feeds back: noise raises the gradient and the gradient the noise,
    until both overflow. Use a `cap`, or quadrature, unless :math:`\beta` is small.

    Args:
      sigma: :math:`\sigma`, at least 0; 0.03.
      beta: :math:`\beta`, at least 0; 0.01.
      combine: `"sum"` or `"quadrature"`.
      cap: the noise of a row has at most this many times the norm of its weights; None for none.
      seed: of the noise.

    Raises:
      ValueError: a number out of range, or an adapter without `Pair`.

    Equals plain training where sigma = beta = 0.

    Example: see `perturbed_value_and_grad`.
      >>> import optax_structured as oxs
      >>> oxs.adapters.GGPO(sigma=0.03, beta=0.01, cap=1.0).combine
      'sum'

    Reference: Chang et al., `LoRA-GGPO <https://arxiv.org/abs/2502.14538v1>`_, 2025, withdrawn by
    its authors for `MGPO`, and without code of theirs: the formula is the community's (sd-scripts),
    in which b a enters without its scale. There no gradient flows through the noise to earlier
    layers; here it is the gradient at the perturbed weights.
    """

    sigma: float = 0.03
    beta: float = 0.01
    combine: Literal["sum", "quadrature"] = "sum"
    cap: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_nonnegative("sigma", self.sigma)
        check_nonnegative("beta", self.beta)
        if self.combine not in ("sum", "quadrature"):
            raise ValueError(f"GGPO(combine=...) is 'sum' or 'quadrature', got {self.combine!r}")
        if self.cap is not None:
            check_positive("cap", self.cap)

    def init(self, params: Any, adapter: Mapping[str, Any]) -> GGPOState:
        leaves = dict(named_leaves(params))

        def rows(path: str, pair: Any) -> RowNorms:
            matrix = jnp.swapaxes(pair.axes.to_matrix(at_least_float32(leaves[path])), -1, -2)
            norms = _row_norms(matrix)
            mean = jnp.mean(norms, axis=-2, keepdims=True)
            return RowNorms(mean, jnp.zeros_like(norms), jnp.zeros_like(norms))

        found = {path: rows(path, pair) for path, pair in pairs_of("GGPO", adapter).items()}
        return GGPOState(found, jax.random.key(self.seed), jnp.zeros((), jnp.int32))

    def scales(self, state: GGPOState) -> dict[str, jax.Array]:
        r"""The standard deviation of the noise of each row, (\*batch, m, 1), by path."""

        def scale(rows: RowNorms) -> jax.Array:
            w, g = rows.weight, rows.gradient
            if self.combine == "sum":
                size = self.sigma * w + self.beta * jnp.square(g)
            else:
                size = jnp.hypot(self.sigma * w, self.beta * g)
            if self.cap is not None:
                size = jnp.minimum(size, self.cap * w)
            return size / jnp.sqrt(w.shape[-2])

        return {path: scale(rows) for path, rows in state.rows.items()}

    def apply(
        self, state: GGPOState, params: Any, adapter: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        pairs, key = pairs_of("GGPO", adapter), jax.random.fold_in(state.key, state.step)
        noise = {}
        for path, scale in self.scales(state).items():
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            shape = (*scale.shape[:-1], pairs[path].a.shape[-1])
            noise[path] = scale * jax.random.normal(own, shape, scale.dtype)
        return add_to_weights(params, noise, pairs), adapter

    def observe(self, state: GGPOState, adapter: Mapping[str, Any], gradient: Any) -> GGPOState:
        def rows(path: str, pair: Any) -> RowNorms:
            old, g = state.rows[path], gradient[path]
            product = _row_norms(placement.product(pair.b, pair.a))
            return RowNorms(
                old.base, jnp.hypot(old.base, product), _row_norms(first_order(pair, g.a, g.b))
            )

        found = {path: rows(path, pair) for path, pair in pairs_of("GGPO", adapter).items()}
        return GGPOState(found, state.key, state.step + 1)


def _row_norms(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=-1, keepdims=True)
