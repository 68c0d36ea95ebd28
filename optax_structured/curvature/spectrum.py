"""Eigenvalue density of a Hessian by stochastic Lanczos quadrature."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_structured.curvature.products import Product, hvp
from optax_structured.trees.products import dot, rows_times


class Density(NamedTuple):
    """An estimate of a spectrum: weighted eigenvalues, one row per probe."""

    nodes: jax.Array  # (probes, order): Ritz values, ascending
    weights: jax.Array  # (probes, order): at least 0, each row adds up to 1
    size: jax.Array  # (): number of eigenvalues that the density is of


class SpectrumSummary(NamedTuple):
    """What a `Density` says in a few numbers."""

    largest: jax.Array  # (): the largest Ritz value, below the largest eigenvalue
    smallest: jax.Array  # (): the smallest one
    trace: jax.Array  # (): sum of eigenvalues
    frobenius: jax.Array  # (): root of the sum of their squares
    effective_rank: jax.Array  # (): (sum of |eigenvalues|)^2 / sum of their squares
    negative_mass: jax.Array  # () in [0, 1]: share of eigenvalues below the noise floor


def lanczos(product: Product, start: Any, order: int) -> tuple[jax.Array, jax.Array]:
    r"""The tridiagonal matrix of a symmetric linear map on the Krylov space of a vector.

    All vectors are orthogonalised twice against all earlier ones, which takes `order` copies of
    the parameters. One `scan`: compile time does not depend on the order. Where the space is
    exhausted, all later numbers are 0.

    Args:
      product: symmetric, of trees like `start`.
      start: a vector other than 0.
      order: k, products.

    Returns:
      `(alpha, beta)`, (k,) and (k-1,): its diagonal and the diagonal beside it.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> alpha, beta = oxs.curvature.lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 2)
      >>> bool(jnp.allclose(alpha, 2.0)), bool(jnp.allclose(beta, 1.0))
      (True, True)

    References:
      Golub and Meurant, Matrices, Moments and Quadrature, 2010.
    """
    dtype = dot(start, start).dtype
    eps = jnp.finfo(dtype).eps
    scaled = lambda tree, c: jax.tree.map(lambda x: x * c.astype(x.dtype), tree)  # noqa: E731
    minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)  # noqa: E731

    def overlap(basis: Any, vector: Any) -> jax.Array:
        parts = jax.tree.map(lambda q, x: rows_times(q, x).astype(dtype), basis, vector)
        return sum(jax.tree.leaves(parts), jnp.zeros(order, dtype))

    def combine(basis: Any, numbers: jax.Array) -> Any:
        return jax.tree.map(
            lambda q: jnp.tensordot(numbers.astype(q.dtype), q, 1, precision="highest"), basis
        )

    def step(carry: Any, i: jax.Array) -> Any:
        basis, vector, scale = carry
        basis = jax.tree.map(lambda q, x: q.at[i].set(x), basis, vector)
        image = product(vector)
        alpha = dot(vector, image)
        scale = jnp.maximum(scale, jnp.sqrt(dot(image, image)))
        for _ in range(2):
            image = minus(image, combine(basis, overlap(basis, image)))
        beta = jnp.sqrt(dot(image, image))
        alive = beta > 10 * eps * scale
        beta = jnp.where(alive, beta, 0)
        following = scaled(image, jnp.where(alive, 1 / jnp.where(alive, beta, 1), 0))
        return (basis, following, scale), (alpha, beta)

    first = scaled(start, 1 / jnp.sqrt(dot(start, start)))
    nothing = jax.tree.map(jnp.zeros_like, first)
    basis = jax.tree.map(lambda x: jnp.broadcast_to(x, (order, *x.shape)), nothing)
    carry = (basis, first, jnp.zeros((), dtype))
    _, (alpha, beta) = jax.lax.scan(step, carry, jnp.arange(order))
    return alpha, beta[:-1]


def quadrature(alpha: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nodes and weights of the Gauss quadrature that a tridiagonal matrix stands for.

    Args:
      alpha: (k,), the diagonal.
      beta: (k-1,), the one beside it. What follows a 0 has no weight.

    Returns:
      `(nodes, weights)`, (k,) each, ascending; weights are at least 0 and add up to 1.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> nodes, weights = oxs.curvature.quadrature(jnp.array([2.0, 2.0]), jnp.array([1.0]))
      >>> print(nodes, weights)
      [1. 3.] [0.5 0.5]
    """
    matrix = jnp.diag(alpha) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
    nodes, vectors = jnp.linalg.eigh(matrix)
    weights = jnp.square(vectors[0])
    return nodes, weights / jnp.sum(weights)


def spectral_density(
    product: Product,
    like: Any,
    key: jax.Array,
    *,
    order: int = 64,
    probes: int = 4,
    distribution: Literal["gaussian", "rademacher"] = "gaussian",
    mask: Any = None,
    preconditioner: Any = None,
) -> Density:
    r"""Eigenvalue density of a symmetric linear map.

    For a probe v, :math:`v^\top f(A) v \approx \|v\|^2 \sum_j w_j f(\theta_j)`, exact for
    polynomials f of degree below 2 `order`, with all weight on the eigenvalues themselves once the
    order reaches their number.

    Args:
      product: the map, of trees like `like`, such as `hvp` or `ggn_vp` makes.
      like: a tree with the shapes, dtypes and shardings of the parameters.
      key: of the random probes.
      order: k, products a probe, 30 to 100; takes k copies of the parameters.
      probes: how many random vectors, 1 to 10, one after the other.
      distribution: of the probes.
      mask: a tree like `like` of booleans or arrays of them: the spectrum of that block only.
      preconditioner: P, a tree of positive diagonals: the spectrum of
        :math:`P^{-1/2} A P^{-1/2}`, which decides on the stability of steps :math:`P^{-1} G`.

    Returns:
      A `Density`.

    Raises:
      ValueError: an order or number of probes below 1, another distribution.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> A = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
      >>> found = oxs.curvature.spectral_density(
      ...     lambda v: A @ v, jnp.zeros(3), jax.random.key(0), order=3, probes=1
      ... )
      >>> bool(jnp.allclose(found.nodes, A.diagonal(), rtol=1e-4))
      True

    References:
      Ghorbani, Krishnan and Xiao, `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019. Sagun et al., `Empirical
      Analysis of the Hessian <https://arxiv.org/abs/1706.04454>`_, 2017.
    """
    if order < 1 or probes < 1:
        raise ValueError(f"order and probes must be at least 1, got {order} and {probes}")
    if distribution not in ("gaussian", "rademacher"):
        raise ValueError(f"distribution must be gaussian or rademacher, got {distribution!r}")
    leaves, structure = jax.tree.flatten(like)
    draw = jax.random.normal if distribution == "gaussian" else jax.random.rademacher
    select: Callable[[Any], Any] = lambda tree: tree  # noqa: E731
    if mask is not None:
        select = lambda tree: jax.tree.map(lambda x, m: jnp.where(m, x, 0), tree, mask)  # noqa: E731
    rescale: Callable[[Any], Any] = lambda tree: tree  # noqa: E731
    if preconditioner is not None:
        rescale = lambda tree: jax.tree.map(  # noqa: E731
            lambda x, p: x / jnp.sqrt(jnp.asarray(p, x.dtype)), tree, preconditioner
        )

    def operator(v: Any) -> Any:
        return select(rescale(product(rescale(v))))

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, len(leaves))
        # `+ 0 * x` would carry NaN: zeros_like keeps the sharding without the numbers.
        probe = [
            jnp.zeros_like(x) + draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
        ]
        return quadrature(*lanczos(operator, select(jax.tree.unflatten(structure, probe)), order))

    nodes, weights = jax.lax.map(one, jax.random.split(key, probes))
    ones = select(jax.tree.map(jnp.ones_like, like))
    size = sum(jnp.sum(x, dtype=nodes.dtype) for x in jax.tree.leaves(ones))
    return Density(nodes, weights, jnp.asarray(size))


def hessian_density(
    loss: Callable[..., Any],
    params: Any,
    batch: Any,
    key: jax.Array,
    *,
    order: int = 64,
    probes: int = 4,
    mask: Any = None,
    preconditioner: Any = None,
) -> Density:
    """Eigenvalue density of the Hessian of a loss on one batch.

    Args:
      loss: `loss(params, batch)`, a mean over the batch, with dropout and statistics frozen.
      params: where. In float32, eigenvalues below 1e-7 of the largest are noise.
      batch: the same for all products; as large as fits.
      key: of the random probes.
      order: see `spectral_density`.
      probes: see `spectral_density`.
      mask: see `spectral_density`; `layer_masks` makes one per layer.
      preconditioner: see `spectral_density`; of Adam, the root of the second moment plus eps.

    Returns:
      A `Density`, for `summarize` and `smooth`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> loss = lambda w, batch: jnp.sum(batch * w**2)
      >>> found = oxs.curvature.hessian_density(
      ...     loss, jnp.ones(3), jnp.array([1.0, 1.0, 4.0]), jax.random.key(0), order=2, probes=1
      ... )
      >>> print(oxs.curvature.summarize(found).largest.round(3))
      8.0

    References:
      Ghorbani, Krishnan and Xiao, `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019.
    """
    product = hvp(loss, params, batch)
    return spectral_density(
        product, params, key, order=order, probes=probes, mask=mask, preconditioner=preconditioner
    )


def layer_masks(params: Any) -> dict[str, Any]:
    """A mask for each leaf, by its path, for `hessian_density` per layer.

    Args:
      params: a tree.

    Returns:
      By path, a tree of booleans. As arrays, so that one compiled density serves all of them.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> masks = oxs.curvature.layer_masks({"a": jnp.ones(2), "b": jnp.ones(3)})
      >>> {path: {k: bool(m) for k, m in mask.items()} for path, mask in masks.items()}
      {'a': {'a': True, 'b': False}, 'b': {'a': False, 'b': True}}
    """
    paths, structure = jax.tree.flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return {
        name: jax.tree.unflatten(structure, [jnp.asarray(i == j) for j in range(len(names))])
        for i, name in enumerate(names)
    }


def smooth(
    density: Density, grid: jax.Array | None = None, sigma_squared: float = 1e-5, points: int = 1024
) -> tuple[jax.Array, jax.Array]:
    r"""A density on a grid: each node a Gaussian, averaged over probes.

    Args:
      density: of `spectral_density`.
      grid: (points,), evenly spaced and ascending; None for one from the mean smallest node minus
        0.01 to the mean largest plus 0.01.
      sigma_squared: variance of the Gaussians, in units of the width of the spectrum where that is
        above 1; 1e-5 to 1e-1. It is a variance, though code elsewhere calls it sigma.
      points: of a grid that is not given.

    Returns:
      `(values, grid)`, whose Riemann sum is 1.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> point = oxs.curvature.Density(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones(()))
      >>> values, grid = oxs.curvature.smooth(point, jnp.linspace(-1, 1, 5), sigma_squared=1.0)
      >>> print(*(f"{x:.2f}" for x in values))
      0.30 0.44 0.50 0.44 0.30

    References:
      Ghorbani, Krishnan and Xiao, 2019, and its code, whose conventions these are.
    """
    low, high = (jnp.mean(e) for e in (density.nodes[:, 0] - 0.01, density.nodes[:, -1] + 0.01))
    if grid is None:
        grid = jnp.linspace(low, high, points)
    width = sigma_squared * jnp.maximum(1, high - low)
    gaussians = jnp.exp(-jnp.square(grid[:, None, None] - density.nodes) / (2 * width))
    values = jnp.mean(jnp.sum(gaussians * density.weights, -1), -1)
    return values / (jnp.sum(values) * (grid[1] - grid[0])), grid


def summarize(density: Density, noise: float | None = None) -> SpectrumSummary:
    """Largest and smallest eigenvalue, trace, effective rank and negative mass of a density.

    Args:
      density: of `spectral_density`.
      noise: eigenvalues down to minus this share of the largest magnitude count as 0, not as
        negative; 10 roundings by default.

    Returns:
      `SpectrumSummary`; sums are averages over probes times the number of eigenvalues.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> nodes, weights = jnp.array([[-1.0, 3.0]]), jnp.array([[0.5, 0.5]])
      >>> found = oxs.curvature.summarize(oxs.curvature.Density(nodes, weights, jnp.array(2.0)))
      >>> print(found.trace, found.effective_rank, found.negative_mass)
      2.0 1.6 0.5
    """
    nodes, weights, size = density
    mean = lambda x: jnp.mean(jnp.sum(weights * x, -1))  # noqa: E731
    share = 10 * jnp.finfo(nodes.dtype).eps if noise is None else noise
    floor = -share * jnp.max(jnp.abs(nodes))
    square = mean(nodes**2)
    some = jnp.where(weights > 0, nodes, jnp.nan)  # what was never reached has no weight
    return SpectrumSummary(
        largest=jnp.nanmax(some),
        smallest=jnp.nanmin(some),
        trace=size * mean(nodes),
        frobenius=jnp.sqrt(size * square),
        effective_rank=size * mean(jnp.abs(nodes)) ** 2 / jnp.where(square == 0, 1, square),
        negative_mass=mean(nodes < floor),
    )
