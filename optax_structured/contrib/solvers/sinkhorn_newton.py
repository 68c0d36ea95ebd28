"""Entropic optimal transport: rounds of Sinkhorn, then Newton steps with a sparse Hessian."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from optax_structured.trees.checks import check_positive


class TransportPlan(NamedTuple):
    """Result of `sinkhorn_newton`."""

    plan: jax.Array  # (n, m)
    x: jax.Array  # (n,): potentials of the rows, of mean 0
    y: jax.Array  # (m,): potentials of the columns
    error: jax.Array  # (): sum of absolute errors of the marginals
    newton_steps: jax.Array  # () int32


def sinkhorn_newton(
    cost: ArrayLike,
    rows: ArrayLike,
    columns: ArrayLike,
    eta: ArrayLike,
    *,
    warmup: int = 20,
    keep: int | None = None,
    tolerance: float | None = None,
    max_steps: int = 50,
) -> TransportPlan:
    r"""Transport plan of least cost and entropy, to rounding error in few steps.

    .. math:: \min_P\; \langle C, P\rangle + \tfrac1\eta \sum_{ij} P_{ij} \log P_{ij}, \quad
        P\mathbf{1} = r,\; P^\top\mathbf{1} = c; \qquad
        P_{ij} = e^{\eta(x_i + y_j - C_{ij}) - 1}

    After some rounds of Sinkhorn most of P is close to zero. Newton's method on the potentials then
    keeps the largest entries of P in the off-diagonal blocks of the Hessian, and all of them in its
    diagonal; conjugate gradients solve it, and a line search guards it.

    Args:
      cost: C (n, m).
      rows: r (n,), above 0.
      columns: c (m,), above 0, of the same sum.
      eta: one over the strength of the entropy; 100 to 1000 for costs up to 1. Where eta times the
        largest cost is below 50, plain Sinkhorn is faster.
      warmup: rounds of Sinkhorn; 20, and some 700 for costs with plans that are not unique.
      keep: entries of P in the Hessian; None: 6 max(n, m). 15 max(n, m) for such costs.
      tolerance: sum of absolute errors of the marginals; None: 1e-12 in float64. In float32 they
        reach some 1e-5, as exp(eta ...) is that exact, and None is 1e-4.
      max_steps: Newton steps, at most.

    Returns:
      A `TransportPlan`. Plan and potentials have the derivatives of the exact solution, in cost,
      marginals and eta, by one more linear solve.

    Raises:
      ValueError: shapes that do not fit.

    Equals :math:`r c^\top` as eta goes to 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> cost = jax.random.uniform(jax.random.key(0), (20, 30))
      >>> found = sinkhorn_newton(cost, jnp.full(20, 1 / 20), jnp.full(30, 1 / 30), 100.0)
      >>> print(bool(found.error < 1e-4), bool(found.newton_steps < 20))
      True True

    References:
      Tang et al., `Accelerating Sinkhorn Algorithm with Sparse Newton Iterations
      <https://arxiv.org/abs/2401.12253>`_, 2024. No code was published. Gradients are projected
      on what the Hessian can see here, without which the last step can blow up.
    """
    cost, rows, columns = (jnp.asarray(a) for a in (cost, rows, columns))
    n, m = rows.size, columns.size
    if cost.shape != (n, m) or rows.ndim != 1 or columns.ndim != 1:
        raise ValueError(
            f"sinkhorn_newton takes a cost (n, m), rows (n,) and columns (m,), got {cost.shape}, "
            f"{rows.shape} and {columns.shape}"
        )
    check_positive("eta", eta)
    dtype = jnp.result_type(cost, rows, columns, jnp.float32)
    eta = jnp.asarray(eta, dtype)
    cost, rows, columns = (a.astype(dtype) for a in (cost, rows, columns))
    if tolerance is None:
        tolerance = 1e-12 if dtype == jnp.float64 else 1e-4
    kept = min(6 * max(n, m) if keep is None else keep, n * m)
    problem = jax.lax.stop_gradient((cost, rows, columns, eta))

    def residual(z: Any) -> Any:
        plan = _plan(cost, eta, *z)
        return rows - plan.sum(1), columns - plan.sum(0)

    def tangent_solve(linear: Any, right: Any) -> Any:
        """With minus the whole Hessian, on the complement of its null space."""

        def solve(matvec: Any, right: Any) -> Any:
            negative = lambda v: jax.tree.map(jnp.negative, matvec(v))  # noqa: E731
            right = jax.tree.map(jnp.negative, _visible(right))
            return _visible(cg(negative, right, tol=1e-10, maxiter=10 * (n + m))[0])

        return jax.lax.custom_linear_solve(linear, right, solve, symmetric=True)

    def solve(_: Any, z: Any) -> Any:
        z, steps = _solved(*problem, z, warmup, kept, tolerance, max_steps)
        return z, steps.astype(dtype)  # integers have no tangents that custom_root would take

    start = jnp.zeros(n, dtype), jnp.zeros(m, dtype)
    (x, y), steps = jax.lax.custom_root(residual, start, solve, tangent_solve, has_aux=True)
    plan = _plan(cost, eta, x, y)
    shift = x.mean()
    return TransportPlan(
        plan, x - shift, y + shift, _error(plan, rows, columns), steps.astype(jnp.int32)
    )


def _plan(cost: jax.Array, eta: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.exp(eta * (x[:, None] + y - cost) - 1)


def _error(plan: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.abs(plan.sum(1) - rows).sum() + jnp.abs(plan.sum(0) - columns).sum()


def _visible(z: Any) -> Any:
    """Without its part along (1, -1), which changes no plan."""
    x, y = z
    shift = (x.sum() - y.sum()) / (x.size + y.size)
    return x - shift, y + shift


def _solved(
    cost: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    eta: jax.Array,
    z: Any,
    warmup: int,
    kept: int,
    tolerance: float,
    max_steps: int,
) -> tuple[Any, jax.Array]:
    def sinkhorn(_: Any, z: Any) -> Any:
        x, y = z
        of_rows = jax.nn.logsumexp(eta * (x[:, None] + y - cost) - 1, axis=1)
        x = x + (jnp.log(rows) - of_rows) / eta
        of_columns = jax.nn.logsumexp(eta * (x[:, None] + y - cost) - 1, axis=0)
        return x, y + (jnp.log(columns) - of_columns) / eta

    def look(z: Any) -> tuple[jax.Array, jax.Array]:
        plan = _plan(cost, eta, *z)
        value = -plan.sum() / eta + rows @ z[0] + columns @ z[1]
        return value, _error(plan, rows, columns)

    def newton(carry: Any) -> Any:
        count, z, (value, error) = carry
        plan = _plan(cost, eta, *z)
        by_row, by_column = plan.sum(1), plan.sum(0)
        entries, where = jax.lax.top_k(plan.reshape(-1), kept)
        i, j = where // columns.size, where % columns.size

        def hessian(v: Any) -> Any:
            across = jnp.zeros_like(rows).at[i].add(entries * v[1][j])
            down = jnp.zeros_like(columns).at[j].add(entries * v[0][i])
            return eta * (by_row * v[0] + across), eta * (by_column * v[1] + down)

        def jacobi(v: Any) -> Any:
            return v[0] / (eta * by_row), v[1] / (eta * by_column)

        slope = _visible((rows - by_row, columns - by_column))
        step = cg(hessian, slope, tol=1e-10, maxiter=4 * (rows.size + columns.size), M=jacobi)[0]
        step = _visible(step)
        gain = slope[0] @ step[0] + slope[1] @ step[1]

        def ahead(size: jax.Array) -> Any:
            return z[0] + size * step[0], z[1] + size * step[1]

        def rejected(trial: Any) -> jax.Array:
            size, (value_then, error_then) = trial
            # Close to the end the value cannot resolve progress, and the marginals can.
            good = (value_then >= value + 1e-4 * size * gain) | (error_then < 0.9 * error)
            return ~good & (size > 1e-6)

        def halved(trial: Any) -> Any:
            return trial[0] / 2, look(ahead(trial[0] / 2))

        one = jnp.ones((), cost.dtype)
        size, _ = jax.lax.while_loop(rejected, halved, (one, look(ahead(one))))
        x, y = ahead(size)
        shift = x.mean()
        # Without a step that helps, as for a Hessian that is singular to rounding: Sinkhorn again.
        z = jax.lax.cond(
            size > 1e-6,
            lambda: (x - shift, y + shift),
            lambda: jax.lax.fori_loop(0, 20, sinkhorn, z),
        )
        return count + 1, z, look(z)

    def go_on(carry: Any) -> jax.Array:
        count, _, (_, error) = carry
        return (count < max_steps) & (error > tolerance)

    z = jax.lax.fori_loop(0, warmup, sinkhorn, z)
    carry = (jnp.int32(0), z, look(z))
    count, z, _ = jax.lax.while_loop(go_on, newton, carry)
    return z, count
