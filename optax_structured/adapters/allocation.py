"""SNELLA's allocator: a budget of nonzeros shared out among the weights by their importance."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.adapters.snell import Kernel
from optax_structured.trees.checks import check_fraction, check_positive


class Importance(NamedTuple):
    """Running scores of the factors of one weight."""

    size: Any  # (inputs, outputs), shaped like the factors: running |p g|
    spread: Any  # likewise: running distance of |p g| from it


class AllocatorState(NamedTuple):
    """State of `SparsityAllocator`."""

    scores: dict[str, Importance]  # by path
    sparsity: dict[str, jax.Array]  # by path, (): for the `constants` of `merge`


@dataclasses.dataclass(frozen=True)
class SparsityAllocator:
    r"""Lets weights compete for the entries of a shrinking budget.

    After every step :math:`I = |p\, g|` for each entry p of a factor,
    :math:`\bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I` and
    :math:`U \leftarrow \beta_2 U + (1 - \beta_2) |I - \bar I|`; the score of a weight is
    :math:`c_l = \overline{\bar I U}` of its one factor plus that of the other. Of the budget

    .. math:: V_t = V_T + (V_0 - V_T) \left(1 - \frac{t - t_i}{T - t_f - t_i}\right)^3

    a weight of :math:`n_l` entries gets :math:`v_l = \min(n_l, \lambda c_l)` with
    :math:`\sum_l v_l = V_t`, and the sparsity :math:`1 - v_l / n_l`.

    Args:
      total: T, in calls of `allocate`; the authors call it once an epoch.
      target: share of zeros over all weights in the end, in [0, 1).
      initial: share of zeros at first, in [0, 1).
      begin: t_i: calls before the budget shrinks.
      end: t_f: calls at the end with the whole target reached.
      interval: calls between reallocations, at least 1.
      b1: :math:`\beta_1`, in [0, 1).
      b2: :math:`\beta_2`, in [0, 1).
      min_density: share of entries that a weight keeps at least. At 0, as published, a weight that
        has lost all of them has no gradient and never returns.

    Raises:
      ValueError: a number out of range; an adapter without `SNELL` or `SNELLA`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params, adapters = {"kernel": jnp.zeros((6, 5))}, oxs.adapters
      >>> adapter = adapters.init(jax.random.key(0), params, adapters.SNELLA(4))
      >>> allocator = adapters.SparsityAllocator(total=10, target=0.8)
      >>> state = allocator.allocate(allocator.init(adapter), 0)
      >>> merged = adapters.merge(params, adapter, state.sparsity)
      >>> state = allocator.observe(state, adapter, gradient=adapter)  # after apply_updates

    Reference: Shen et al., `SNELLA <https://arxiv.org/abs/2510.24037>`_, 2025. Their loop adds up
    in float32, where it may never end, and fails where all scores are zero; here it is the closed
    form, and equal densities.
    """

    total: int
    target: float
    initial: float = 0.01
    begin: int = 0
    end: int = 0
    interval: int = 1
    b1: float = 0.85
    b2: float = 0.85
    min_density: float = 0.0

    def __post_init__(self) -> None:
        for name in ("target", "initial", "b1", "b2", "min_density"):
            check_fraction(name, getattr(self, name))
        check_positive("interval", self.interval)
        if not self.total > self.begin + self.end >= 0:
            raise ValueError(
                f"SparsityAllocator: total={self.total!r} must exceed begin + end, "
                f"{self.begin!r} + {self.end!r}"
            )

    def init(self, adapter: Mapping[str, Any]) -> AllocatorState:
        """Scores of zero, and the initial sparsity everywhere."""
        kernels = _kernels(adapter)

        def score(kernel: Kernel) -> Importance:
            factors = (kernel.inputs, kernel.outputs)
            return Importance(*(jax.tree.map(jnp.zeros_like, factors) for _ in range(2)))

        first = {p: jnp.full(_batch(k), self.initial, k.inputs.dtype) for p, k in kernels.items()}
        return AllocatorState({path: score(k) for path, k in kernels.items()}, first)

    def observe(
        self, state: AllocatorState, adapter: Mapping[str, Any], gradient: Mapping[str, Any]
    ) -> AllocatorState:
        """The scores after a step, from the adapter after its update and the gradient of it."""

        def score(kernel: Kernel, g: Kernel, old: Importance) -> Importance:
            now = jax.tree.map(
                lambda p, g: jnp.nan_to_num(jnp.abs(p * g), posinf=0.0),
                (kernel.inputs, kernel.outputs),
                (g.inputs, g.outputs),
            )
            size = jax.tree.map(lambda m, x: self.b1 * m + (1 - self.b1) * x, old.size, now)
            spread = jax.tree.map(
                lambda u, x, m: self.b2 * u + (1 - self.b2) * jnp.abs(x - m), old.spread, now, size
            )
            return Importance(size, spread)

        kernels = _kernels(adapter)
        scores = {p: score(k, gradient[p], state.scores[p]) for p, k in kernels.items()}
        return AllocatorState(scores, state.sparsity)

    def allocate(self, state: AllocatorState, t: Any) -> AllocatorState:
        """The sparsities at call t, which may be traced; unchanged where none is due."""
        budget, due = self.budget(state, t)
        shares = self.shares(state)
        sizes = jnp.stack([_entries(s, shares.dtype) for s in state.scores.values()])
        floor = jnp.floor(self.min_density * sizes)
        room = jnp.maximum(budget - jnp.sum(floor), 0.0)
        volume = jnp.floor(floor + filled(sizes - floor, shares, room))
        new = jnp.clip(1 - volume / sizes, 0.0, 1.0)
        sparsity = {
            path: jnp.where(due, jnp.broadcast_to(x, old.shape).astype(old.dtype), old)
            for (path, old), x in zip(state.sparsity.items(), new, strict=True)
        }
        return AllocatorState(state.scores, sparsity)

    def shares(self, state: AllocatorState) -> jax.Array:
        """The share of each weight in all scores, in the order of the paths."""

        def score(x: Importance) -> jax.Array:
            return sum(jnp.mean(i * u) for i, u in zip(x.size, x.spread, strict=True))  # type: ignore[return-value]

        scores = jnp.stack([score(x) for x in state.scores.values()])
        sizes = jnp.stack([_entries(x, scores.dtype) for x in state.scores.values()])
        total = jnp.sum(scores)
        equal = sizes / jnp.sum(sizes)
        return jnp.where(total > 0, scores / jnp.where(total > 0, total, 1.0), equal)

    def budget(self, state: AllocatorState, t: Any) -> tuple[jax.Array, jax.Array]:
        """V at call t, and whether sparsities are reallocated."""
        dtype = jax.tree.leaves(state.scores)[0].dtype
        entries = sum(_entries(x, dtype) for x in state.scores.values())
        first, last = (1 - self.initial) * entries, (1 - self.target) * entries
        t = jnp.asarray(t)
        left = 1 - (t - self.begin) / (self.total - self.end - self.begin)
        between = jnp.floor(last + (first - last) * jnp.clip(left, 0.0, 1.0) ** 3)
        early, late = t <= self.begin, t > self.total - self.end
        value = jnp.where(early, first, jnp.where(late, last, between))
        return value, ~early & (late | (t % self.interval == 0))


def filled(sizes: jax.Array, shares: jax.Array, budget: jax.Array) -> jax.Array:
    r"""min(size, :math:`\lambda` share) with the level at which they add up to the budget.

    >>> filled(jnp.array([4.0, 4.0]), jnp.array([0.9, 0.1]), jnp.array(6.0)).tolist()
    [4.0, 2.0]
    """
    some = shares > 0
    ratio = jnp.where(some, sizes / jnp.where(some, shares, 1.0), jnp.inf)
    order = jnp.argsort(ratio)
    full = jnp.cumsum(sizes[order]) - sizes[order]  # what the weights before each one take, whole
    rest = jnp.cumsum(shares[order][::-1])[::-1]  # shares of this one and all after it
    levels = (budget - full) / jnp.where(rest > 0, rest, 1.0)
    # The level is that of the first weight, in order, that it does not fill.
    open_ = (levels < ratio[order]) & (rest > 0)
    level = jnp.where(jnp.any(open_), levels[jnp.argmax(open_)], jnp.inf)
    return jnp.where(some, jnp.minimum(sizes, level * jnp.where(some, shares, 1.0)), 0.0)


def _kernels(adapter: Mapping[str, Any]) -> dict[str, Kernel]:
    found = {path: node for path, node in sorted(adapter.items()) if isinstance(node, Kernel)}
    if not found:
        raise ValueError("SparsityAllocator: the adapter has no weight of SNELL or SNELLA")
    return found


def _batch(kernel: Kernel) -> tuple[int, ...]:
    return kernel.inputs.shape[:-3]


def _entries(score: Importance, dtype: Any) -> jax.Array:
    """The number of entries of the weight of a score."""
    inputs, outputs = score.size
    count = inputs[..., 0, :, 0].size * outputs.shape[-2]
    return jnp.asarray(count, dtype)
