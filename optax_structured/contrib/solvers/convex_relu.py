"""Two-layer ReLU networks as a convex program, by ADMM on the group lasso of this library."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_structured.regularizers import GroupLasso
from optax_structured.trees.checks import check_positive

Loss: TypeAlias = Literal["squared", "logistic"]
_LASSO = GroupLasso(group_axis=0, weight=1.0)


class ConvexReLU(NamedTuple):
    """Result of `convex_relu`."""

    v: jax.Array  # (P, d): hidden units with positive outputs, one a pattern; most rows are 0.0
    w: jax.Array  # (P, d): those with negative outputs
    objective: jax.Array  # (): of v and w
    violation: jax.Array  # (): largest violation of their sign constraints


def activation_patterns(key: jax.Array, x: ArrayLike, draws: int) -> np.ndarray:
    """Which examples random hidden units are active on: the different patterns among them.

    Args:
      key: of the draws, N(0, I).
      x: (n, d), with a column of ones for biases.
      draws: how many.

    Returns:
      (n, P) of bool; P depends on the draws, so this does not run under jit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(activation_patterns(jax.random.key(0), jnp.array([[1.0], [2.0]]), 50).T)
      [[False False]
       [ True  True]]
    """
    x = np.asarray(x)
    units = np.asarray(jax.random.normal(key, (x.shape[1], draws)))
    return np.unique(x @ units >= 0, axis=1)


def convex_relu(
    x: ArrayLike,
    y: ArrayLike,
    patterns: ArrayLike,
    strength: ArrayLike,
    *,
    loss: Loss = "squared",
    rho: float = 0.1,
    steps: int = 2000,
) -> ConvexReLU:
    r"""The optimum of a regularised two-layer ReLU network over given activation patterns.

    .. math:: \min_{v, w}\; \ell\Big(\sum_i D_i X (v_i - w_i),\, y\Big)
        + \beta \sum_i \big(\|v_i\| + \|w_i\|\big), \qquad
        (2D_i - I) X v_i \ge 0, \quad (2D_i - I) X w_i \ge 0

    With all patterns its value is the least of :math:`\ell(f(X), y) + \tfrac\beta2 \sum_j
    (\|u_j\|^2 + a_j^2)` over networks :math:`f(x) = \sum_j \operatorname{relu}(x u_j) a_j` that
    are wide enough; with some of them, an upper bound that `recover_network` attains.

    Args:
      x: (n, d), with a column of ones for biases, which are regularised too.
      y: (n,): targets, or labels 0 and 1.
      patterns: (n, P), the diagonals of D: see `activation_patterns`.
      strength: :math:`\beta`.
      loss: `"squared"`: half the sum of squares; `"logistic"`: the sum of
        :math:`\log(1 + e^{2f}) - 2yf`, so that a logit is 2f.
      rho: penalty of ADMM, 0.01 to 1; smaller for logistic losses.
      steps: of ADMM: tens classify, thousands reach the optimum.

    Returns:
      A `ConvexReLU`. A step costs a solve with an (n, n) matrix and products of the size of the
      patterns times d: the matrix of all 2Pd unknowns is never built, as its blocks are equal.

    Raises:
      ValueError: shapes that do not fit, or an unknown loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> t = jnp.linspace(-1, 1, 9)
      >>> x = jnp.stack([t, jnp.ones(9)], 1)
      >>> patterns = activation_patterns(jax.random.key(0), x, 100)
      >>> found = convex_relu(x, jnp.abs(t), patterns, 1e-3, steps=500)
      >>> hidden, out = recover_network(found)
      >>> print(bool(jnp.abs(jax.nn.relu(x @ hidden) @ out - jnp.abs(t)).max() < 0.05))
      True

    References:
      Bai, Gautam and Sojoudi, `Efficient Global Optimization of Two-Layer ReLU Networks
      <https://arxiv.org/abs/2201.01965>`_, 2022. Its ADMM code is not public; the dual step here is
      that of standard ADMM.
    """
    check_positive("strength", strength)
    check_positive("rho", rho)
    if loss not in _SLOPES:
        raise ValueError(f"loss must be one of {', '.join(_SLOPES)}, got {loss!r}")
    x = jnp.asarray(x)
    dtype = jnp.result_type(x, jnp.float32)
    x, y, active = x.astype(dtype), jnp.asarray(y, dtype), jnp.asarray(patterns, dtype)
    n, d = x.shape
    if y.shape != (n,) or active.ndim != 2 or len(active) != n:
        raise ValueError(
            f"convex_relu takes x (n, d), y (n,) and patterns (n, P), got {x.shape}, {y.shape} and "
            f"{active.shape}"
        )
    count = active.shape[1]
    sides = jnp.array([1.0, -1.0], dtype)
    signs = 2 * active - 1

    def predictions(u: jax.Array) -> jax.Array:
        return jnp.einsum("np,nd,spd,s->n", active, x, u, sides)

    def spread(p: jax.Array) -> jax.Array:  # the adjoint
        return jnp.einsum("np,nd,n,s->spd", active, x, p, sides)

    # The blocks of I + G'G are equal, because the squared signs are 1, and F'F has rank n.
    inverse = jnp.linalg.inv(jnp.eye(d, dtype=dtype) + x.T @ x)
    gram = 2 * (x @ inverse @ x.T) * (active @ active.T)
    slope, curvature = _SLOPES[loss]

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        v, s, dual_v, dual_s, p = carry
        plain = v - dual_v + jnp.einsum("np,nd,snp->spd", signs, x, s - dual_s)
        plain = plain @ inverse
        target = predictions(plain)
        for _ in range(1 if loss == "squared" else 4):  # Newton, from the last step's predictions
            jacobian = jnp.eye(n, dtype=dtype) + gram * (curvature(p) / rho)
            p = p - jnp.linalg.solve(jacobian, p + gram @ (slope(p, y) / rho) - target)
        u = plain - spread(slope(p, y) / rho) @ inverse
        moved = (u + dual_v).reshape(2 * count, d)
        v = _LASSO.prox(moved, 1.0, jnp.asarray(strength, dtype) / rho).reshape(2, count, d)
        inside = jnp.einsum("np,nd,spd->snp", signs, x, u)
        s = jnp.maximum(inside + dual_s, 0)
        return (v, s, dual_v + u - v, dual_s + inside - s, p), None

    zero, slack = jnp.zeros((2, count, d), dtype), jnp.zeros((2, n, count), dtype)
    carry = (zero, slack, zero, slack, jnp.zeros(n, dtype))
    (v, w), *_ = jax.lax.scan(step, carry, length=steps)[0]
    violation = -jnp.min(jnp.einsum("np,nd,spd->snp", signs, x, jnp.stack([v, w])))
    objective = convex_relu_objective(x, y, patterns, v, w, strength, loss)
    return ConvexReLU(v, w, objective, jnp.maximum(violation, 0))


def convex_relu_objective(
    x: ArrayLike,
    y: ArrayLike,
    patterns: ArrayLike,
    v: jax.Array,
    w: jax.Array,
    strength: ArrayLike,
    loss: Loss = "squared",
) -> jax.Array:
    """What `convex_relu` minimises.

    Args:
      x: (n, d).
      y: (n,).
      patterns: (n, P).
      v: (P, d).
      w: (P, d).
      strength: the weight of the norms.
      loss: see `convex_relu`.

    Returns:
      ().

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.ones((1, 1))
      >>> print(convex_relu_objective(one, 3 * one[0], one, one, 0 * one, 0.5))
      2.5
    """
    active = jnp.asarray(patterns, v.dtype)
    f = jnp.einsum("np,nd,pd->n", active, jnp.asarray(x), v - w)
    y = jnp.asarray(y, v.dtype)
    fit = (
        jnp.sum((f - y) ** 2) / 2
        if loss == "squared"
        else jnp.sum(jax.nn.softplus(2 * f) - 2 * y * f)
    )
    return fit + strength * (_LASSO.value(v) + _LASSO.value(w))


def recover_network(found: ConvexReLU) -> tuple[jax.Array, jax.Array]:
    """The network of the optimum, with balanced layers; units that are 0 are left out.

    Args:
      found: from `convex_relu`, not traced: the number of units depends on it.

    Returns:
      Hidden weights (d, k), output weights (k,).

    Example:
      >>> import jax.numpy as jnp
      >>> v, w, zero = jnp.array([[4.0]]), jnp.zeros((1, 1)), jnp.zeros(())
      >>> print(recover_network(ConvexReLU(v, w, zero, zero)))
      (Array([[2.]], dtype=float32), Array([2.], dtype=float32))
    """
    units = jnp.concatenate([found.v, found.w])
    norms = jnp.linalg.norm(units, axis=1)
    live = norms > 0
    roots = jnp.sqrt(norms[live])
    sides = jnp.repeat(jnp.array([1.0, -1.0], units.dtype), len(found.v))
    return (units[live] / roots[:, None]).T, roots * sides[live]


# Slope and curvature of the loss of each example, by its prediction.
_SLOPES: dict[str, Any] = {
    "squared": (lambda f, y: f - y, jnp.ones_like),
    "logistic": (
        lambda f, y: 2 * (jax.nn.sigmoid(2 * f) - y),
        lambda f: 4 * jax.nn.sigmoid(2 * f) * jax.nn.sigmoid(-2 * f),
    ),
}
