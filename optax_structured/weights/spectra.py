"""Spectra of weights, on the host, in numbers that one threshold can compare."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.trees import Axes, Rules, named_leaves, resolve

Criterion = Literal["range", "energy", "median"]


def singular_values(
    params: Any,
    where: Rules | Axes | None = None,
) -> dict[str, np.ndarray]:
    """The spectra behind a plan, to be computed once for several plans.

    Args:
      params: concrete parameters.
      where: as in `welore_plan`.

    Returns:
      By path, arrays of a batch of min(m, n) values, descending, in the precision of the leaf,
      float32 at least.

    Raises:
      ValueError: abstract parameters, or no leaf to consider.

    Example:
      >>> import jax.numpy as jnp
      >>> print(singular_values({"w": jnp.diag(jnp.array([1.0, 3.0]))})["w"])
      [3. 1.]
    """
    leaves = considered(params, where)
    if not leaves:
        raise ValueError(
            "welore: there is no matrix to plan for: no leaf has two axes or more, or `where` "
            "leaves all of them out"
        )
    return {
        path: np.linalg.svd(host_matrix(path, axes, leaf), compute_uv=False)
        for path, axes, leaf in leaves
    }


def considered(params: Any, where: Rules | Axes | None) -> list[tuple[str, Axes, Any]]:
    """`(path, matrix view, leaf)` of the leaves to plan for."""
    leaves = named_leaves(params)
    if where is None:
        for path, leaf in leaves:
            if jnp.ndim(leaf) > 2:
                raise ValueError(
                    f"welore: {path!r} has shape {jnp.shape(leaf)}, which may be a stack of "
                    "matrices, or one matrix with several axes of inputs or outputs: say what, "
                    "where=Axes() for stacks, rules of Axes and None, or presets.axes(model)"
                )
    views = resolve(Axes() if where is None else where, params)
    return [
        (path, view, leaf)
        for (path, leaf), view in zip(leaves, views, strict=True)
        if view is not None
    ]


def scores(s: np.ndarray, criterion: Criterion) -> np.ndarray:
    """Descending scores in which one threshold is comparable between matrices of any scale."""
    s = s.astype(np.float64)
    if criterion == "range":
        above, width = s - s[..., -1:], s[..., :1] - s[..., -1:]
    elif criterion == "energy":
        above = np.sqrt(np.cumsum(np.square(s)[..., ::-1], axis=-1)[..., ::-1])
        width = above[..., :1]
    else:
        above, width = s, np.median(s, axis=-1, keepdims=True)
    # A flat spectrum has nothing to give up; a matrix of zeros has everything.
    flat = np.broadcast_to(s > 0, s.shape).astype(np.float64)
    return np.where(width > 0, above / np.where(width > 0, width, 1), flat)


def host_matrix(path: str, axes: Axes, leaf: Any) -> np.ndarray:
    """The matrix view of a leaf on the host, in a precision that LAPACK has."""
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise ValueError(
            f"welore decomposes the weights on the host, outside jit, but {path!r} has no values: "
            f"{leaf!r}"
        )
    matrix = axes.to_matrix(leaf)
    return np.asarray(matrix, np.promote_types(matrix.dtype, np.float32))
