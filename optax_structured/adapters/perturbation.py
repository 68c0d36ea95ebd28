"""Gradients taken at a perturbed point: what the perturbations share."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_structured.adapters.lora import Pair, is_pair
from optax_structured.meshes import placement
from optax_structured.trees import map_named
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class Perturbation(abc.ABC):
    """Where the gradient of a step is taken: near the adapter, at a point that costs nothing."""

    @abc.abstractmethod
    def init(self, params: Any, adapter: Mapping[str, Any]) -> Any:
        """The state before the first step, which is not perturbed."""

    @abc.abstractmethod
    def apply(self, state: Any, params: Any, adapter: Mapping[str, Any]) -> tuple[Any, Any]:
        """Parameters and adapter at which the gradient of this step is to be taken."""

    @abc.abstractmethod
    def observe(self, state: Any, adapter: Mapping[str, Any], gradient: Any) -> Any:
        """The state after a step, from its gradient and the adapter before its update."""


def perturbed_value_and_grad(
    loss: Callable[..., Any], perturbation: Perturbation
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` with the gradient taken at the perturbed point.

    .. math:: g_t = \nabla L(\theta_t + \epsilon_t)

    The optimizer then steps from :math:`\theta_t`. The frozen weights stay bit for bit: what is
    perturbed is a temporary of the step.

    Args:
      loss: called as `loss(params, adapter, *args)`.
      perturbation: `GGPO(...)` or `MGPO(...)`.

    Returns:
      A function of `(state, params, adapter, *args)` that returns the loss at the perturbed point,
      the gradient with respect to the adapter, and the new state; `perturbation.init(params,
      adapter)` is the first one. With gradient accumulation call it for each micro-batch: each has
      a perturbation of its own. To clip gradients before their norms are taken, call the methods
      `apply` and `observe` instead.

    Example:
      >>> import jax, optax, jax.numpy as jnp, optax_structured as oxs
      >>> params, x = {"kernel": jnp.ones((6, 4))}, jnp.ones((2, 6))
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.LoRA(rank=2))
      >>> def loss(params, adapter, x):
      ...     return jnp.mean((x @ oxs.adapters.merge(params, adapter)["kernel"]) ** 2)
      >>> perturbation, optimizer = oxs.adapters.MGPO(rho=0.05), optax.adam(1e-3)
      >>> step = jax.jit(oxs.adapters.perturbed_value_and_grad(loss, perturbation))
      >>> state, moments = perturbation.init(params, adapter), optimizer.init(adapter)
      >>> value, gradient, state = step(state, params, adapter, x)
      >>> updates, moments = optimizer.update(gradient, moments, adapter)
    """

    def value_and_grad(state: Any, params: Any, adapter: Any, *args: Any) -> tuple[Any, Any, Any]:
        near_params, near = perturbation.apply(state, params, adapter)
        value, gradient = jax.value_and_grad(loss, argnums=1)(near_params, near, *args)
        return value, gradient, perturbation.observe(state, adapter, gradient)

    return value_and_grad


def pairs_of(element: str, adapter: Mapping[str, Any]) -> dict[str, Pair]:
    """The pairs of an adapter by their paths.

    Raises:
      ValueError: there is none.
    """
    pairs = {path: node for path, node in adapter.items() if is_pair(node)}
    if not pairs:
        raise ValueError(f"{element} perturbs pairs of LoRA, and this adapter has none")
    return pairs


def first_order(pair: Pair, da: jax.Array, db: jax.Array) -> jax.Array:
    r"""s (b da + db a), (\*batch, outputs, inputs), in float32 at least."""
    da, db = at_least_float32(da), at_least_float32(db)
    return pair.scale * (placement.product(pair.b, da) + placement.product(db, pair.a))


def add_to_weights(params: Any, noise: Mapping[str, Any], pairs: Mapping[str, Pair]) -> Any:
    r"""The weights plus matrices (\*batch, outputs, inputs), in the dtypes of the weights."""

    def one(path: str, weight: jax.Array) -> jax.Array:
        if path not in noise:
            return weight
        moved = jnp.swapaxes(noise[path], -1, -2)
        wide = at_least_float32(weight)
        near = wide + pairs[path].axes.from_matrix(moved, weight.shape).astype(wide.dtype)
        return near.astype(weight.dtype)

    return map_named(one, params)
