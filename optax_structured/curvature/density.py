"""Densities of eigenvalues: what they say in a few numbers, and as a curve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
