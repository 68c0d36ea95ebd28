"""The simplex: entries of a group are at least zero and add up to a number."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.regularizers.base import promote
from optax_structured.regularizers.groups import OnGroups
from optax_structured.trees.checks import check_positive
from optax_structured.trees.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class Simplex(OnGroups):
    r"""The entries of each group are shares: at or above zero, with a given sum.

    .. math:: \psi(w) = 0 \text{ if } w \ge 0 \text{ and } \textstyle\sum_{i \in g} w_i = s
            \text{ for all } g, \text{ else } \infty, \qquad
        \mathrm{prox}(u, m, \tau)_i = \max(u_i - \nu_g / m_i, 0)

    for every strength, with :math:`\nu_g` such that the sum is s: found exactly, by sorting each
    group. The entries with the smallest :math:`m_i u_i` are zero. The support has a bool per entry.

    Args:
      group_axis: the axis, or axes, that number the groups; all other axes are inside. `0` for
        rows of shares; `()`: the whole leaf is one group.
      batch_axis: axes of stacked layers, which number further groups; default none.
      total: s, above 0.

    Raises:
      TypeError: axes that are not ints.
      ValueError: a total that is not above 0; from `check`, a leaf without these axes or with none
        left inside the group.

    Equals `optax.projections.projection_simplex` for a metric of 1.

    >>> import jax.numpy as jnp, numpy as np
    >>> rows = jnp.array([[0.75, 0.5, -3.0], [0.0, 0.0, 0.0]])
    >>> print(np.asarray(Simplex(group_axis=0).prox(rows, metric=1.0, strength=1.0)).round(3))
    [[0.625 0.375 0.   ]
     [0.333 0.333 0.333]]

    References:
      Held, Wolfe and Crowder, Validation of subgradient optimization, Mathematical Programming,
      1974, for a metric of 1.
    """

    constraint: ClassVar[bool] = True
    total: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("total", self.total)

    def value(self, w: ArrayLike) -> jax.Array:
        """0 where the sums are right up to rounding, else infinity."""
        w = at_least_float32(w)
        if w.size == 0:
            return jnp.zeros((), w.dtype)
        sums = jnp.sum(w, axis=self.coupled_axes(w.ndim))
        rounding = 4 * w.size / sums.size * jnp.finfo(w.dtype).eps
        right = jnp.all(jnp.abs(sums - self.total) <= rounding * self.total)
        return jnp.where(right & jnp.all(w >= 0), 0.0, jnp.inf).astype(w.dtype)

    def prox(self, u: ArrayLike, metric: ArrayLike, strength: ArrayLike) -> jax.Array:
        u, metric, _ = promote(u, metric, strength)
        if u.size == 0:
            return u
        b = metric * u
        axes = self.coupled_axes(b.ndim)
        give = 1 / jnp.broadcast_to(metric, b.shape)  # what an entry gains as nu falls
        active = jax.lax.stop_gradient(b >= _last_active(b, give, self.total, axes))

        def total(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(active, x, 0.0), axis=axes, keepdims=True)

        nu = (total(b * give) - self.total) / total(give)
        w = jnp.maximum(b - nu, 0.0) * give
        # What rounding of a large nu leaves missing is shared out once.
        missing = (self.total - total(w)) / total(give)
        return jnp.where(active, jnp.maximum(w + missing * give, 0.0), w)


def _last_active(b: jax.Array, give: jax.Array, total: float, axes: tuple[int, ...]) -> jax.Array:
    """The smallest b of an entry that is not zero, for each group."""
    kept = [axis for axis in range(b.ndim) if axis not in axes]

    def as_rows(x: jax.Array) -> jax.Array:
        x = jnp.transpose(x, (*kept, *axes))
        return x.reshape(*x.shape[: len(kept)], -1)

    rows, gives = as_rows(b), as_rows(give)
    order = jnp.argsort(rows, axis=-1, descending=True)
    rows, gives = (jnp.take_along_axis(x, order, axis=-1) for x in (rows, gives))
    nu = (jnp.cumsum(rows * gives, axis=-1) - total) / jnp.cumsum(gives, axis=-1)
    # True for the first entries and false from there on; the largest is always in.
    last = jnp.maximum(jnp.sum(rows > nu, axis=-1, keepdims=True), 1) - 1
    found = jnp.take_along_axis(rows, last, axis=-1)[..., 0]
    return jnp.expand_dims(found, axes)
