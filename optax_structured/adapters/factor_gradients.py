"""The step of two factors whose product moves as a given gradient of the weight asks."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.adapters.lora import Pair
from optax_structured.meshes import placement
from optax_structured.trees.precision import at_least_float32
from optax_structured.xla.by_matrix import by_matrix


class Svds(NamedTuple):
    """Thin SVDs of the two factors of a pair, b = Ub p Vb' and a = Ua q Va'."""

    ub: jax.Array  # (*batch, m, r)
    p: jax.Array  # (*batch, r, 1)
    vb: jax.Array  # (*batch, r, r)
    ua: jax.Array  # (*batch, r, r)
    q: jax.Array  # (*batch, 1, r)
    va: jax.Array  # (*batch, n, r)


@dataclasses.dataclass(frozen=True)
class FactorSolver(abc.ABC):
    """Turns the gradients of two factors into the pair that suits their product best."""

    @abc.abstractmethod
    def solve(self, svds: Svds, scale: float, ga: jax.Array, gb: jax.Array) -> Any:
        """The new pair of gradients, from the SVDs of the factors."""


@dataclasses.dataclass(frozen=True)
class Damped(FactorSolver):
    r"""Levenberg-Marquardt: least squares with a penalty on the step of the factors.

    .. math:: (dA, dB) = (J^\top J + \lambda I)^{-1} J^\top \operatorname{vec}(G), \qquad
        J : (dA, dB) \mapsto s\,(b\, dA + dB\, a), \qquad
        \lambda = \mu s^2 (\|b\|_F^2 + \|a\|_F^2) / 2r

    Nothing is divided by a singular value, so the step is smooth where b = 0.

    Args:
      damping: :math:`\mu`, relative to the mean of the squared singular values of both factors;
        0.1, useful 1e-3 to 10. Towards 0 it is `MinimumNorm`, towards infinity a multiple of the
        plain gradients.

    Raises:
      ValueError: a damping that is not above 0.

    Example:
      >>> import optax_structured as oxs
      >>> optimizer = oxs.adapters.lora_pro(oxs.adapters.Damped(0.01))
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"Damped(damping=...) must be above 0, got {self.damping!r}")

    def solve(self, svds: Svds, scale: float, ga: jax.Array, gb: jax.Array) -> Any:
        ub, p, vb, ua, q, va = svds
        p2, q2 = jnp.square(scale * p), jnp.square(scale * q)
        mean = (jnp.mean(p2, -2, keepdims=True) + jnp.mean(q2, -1, keepdims=True)) / 2
        penalty = self.damping * mean
        h = _t(vb) @ ga
        hv, k = h @ va, gb @ ua
        uk = _t(ub) @ k
        both = p2 + q2 + penalty
        da = vb @ (_over(h - hv @ _t(va), p2 + penalty) + _over(hv, both) @ _t(va))
        db = (_over(k - ub @ uk, q2 + penalty) + ub @ _over(uk, both)) @ _t(ua)
        return da, db


@dataclasses.dataclass(frozen=True)
class MinimumNorm(FactorSolver):
    r"""LoRA-Pro as published: the least-squares pair, of least norm.

    .. math::
        dA &= s^{-2} (b^\top b + \delta)^{-1} g_A + X a \\
        dB &= s^{-2} (I - b (b^\top b + \delta)^{-1} b^\top) g_B (a a^\top + \delta)^{-1} - b X

    with the X that solves :math:`b^\top b X + X a a^\top = -s^{-2} (b^\top b + \delta)^{-1} g_A
    a^\top`. For :math:`\delta = 0` it is :math:`J^+ \operatorname{vec}(G)`, see `Damped`.

    After a first step from b = 0 the second one moves a by an amount that does not depend on the
    learning rate, most of its norm: only :math:`\delta` limits it, and it is absolute.

    Args:
      delta: :math:`\delta`, at least 0; published 1e-8.
      x: `"sylvester"` for that X, or `"zero"` for X = 0.

    Raises:
      ValueError: a negative delta or an unknown x.

    Example:
      >>> import optax_structured as oxs
      >>> optimizer = oxs.adapters.lora_pro(oxs.adapters.MinimumNorm())
    """

    delta: float = 1e-8
    x: Literal["sylvester", "zero"] = "sylvester"

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise ValueError(f"MinimumNorm(delta=...) must be at least 0, got {self.delta!r}")
        if self.x not in ("sylvester", "zero"):
            raise ValueError(f"MinimumNorm(x=...) is 'sylvester' or 'zero', got {self.x!r}")

    def solve(self, svds: Svds, scale: float, ga: jax.Array, gb: jax.Array) -> Any:
        ub, p, vb, ua, q, va = svds
        p2, q2 = jnp.square(p), jnp.square(q)
        h = _t(vb) @ ga
        inner, outer = h, jnp.zeros(())
        if self.x == "sylvester":
            hv = h @ va
            inner = h - hv @ _t(va) + (hv * _over(p2, p2 + q2)) @ _t(va)
            outer = ub @ (hv * _over(q * p, (p2 + self.delta) * (p2 + q2))) @ _t(ua)
        da = vb @ _over(inner, p2 + self.delta)
        rest = gb - ub @ (_over(p2, p2 + self.delta) * (_t(ub) @ gb))
        db = _over(rest @ ua, q2 + self.delta) @ _t(ua) + outer
        return da / scale**2, db / scale**2


def svds_of(pairs: Sequence[Pair]) -> list[Svds]:
    """The SVDs of the factors of all pairs; those of equal shape as one batch."""
    tall = [at_least_float32(pair.b) for pair in pairs]
    tall += [jnp.swapaxes(at_least_float32(pair.a), -1, -2) for pair in pairs]
    found = _thin_svds(tall)
    return [
        Svds(ub, p[..., None], _t(vbt), _t(uat), q[..., None, :], va)
        for (ub, p, vbt), (va, q, uat) in zip(found[: len(pairs)], found[len(pairs) :], strict=True)
    ]


def equivalent(pair: Pair, da: jax.Array, db: jax.Array) -> jax.Array:
    r"""E = s (b dA + dB a), how the weight moves when the factors move by these."""
    return pair.scale * (placement.product(pair.b, da) + placement.product(db, pair.a))


def _thin_svds(arrays: Sequence[jax.Array]) -> list[Any]:
    def svd(x: jax.Array) -> Any:
        return by_matrix(lambda y: jnp.linalg.svd(y, full_matrices=False), x)

    if placement.on_explicit_mesh(*arrays):
        return [svd(x) for x in arrays]
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        alike.setdefault((x.shape, x.dtype), []).append(i)
    found: list[Any] = [None] * len(arrays)
    for places in alike.values():
        parts = svd(jnp.stack([arrays[i] for i in places]))
        for j, i in enumerate(places):
            found[i] = tuple(part[j] for part in parts)
    return found


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _over(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0.0, 0.0, x / jnp.where(y == 0.0, 1.0, y))
