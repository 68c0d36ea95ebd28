"""Eigenvalue density of a Hessian by stochastic Lanczos quadrature."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structured.curvature.density import Density
from optax_structured.curvature.lanczos import lanczos, quadrature
from optax_structured.curvature.products import Product, hvp


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
      order, probes: see `spectral_density`.
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
