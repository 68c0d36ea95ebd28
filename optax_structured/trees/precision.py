"""In which precision an optimizer accumulates: that of the parameters, float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def common_dtype(*arrays: Any) -> Any:
    """The precision that holds all of these arrays, also where JAX is told not to promote."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def wide_dtype(*arrays: Any) -> Any:
    """The precision of these arrays together, float32 at least."""
    return common_dtype(*arrays, jnp.float32)


def at_least_float32(x: ArrayLike) -> jax.Array:
    """`x` in its own precision, float32 at least: that of every accumulator."""
    return jnp.asarray(x, wide_dtype(x))


def as_update(x: jax.Array, gradient: ArrayLike, param: Any = None) -> jax.Array:
    """`x` in the precision of an update: no narrower than the gradient, nor than the weight.

    Float32 at least where the weight is not known: it may be float32, and a small step is lost in
    half precision.
    """
    known = jnp.float32 if param is None else jnp.result_type(param)
    dtype = common_dtype(jnp.result_type(gradient), known)
    return x.astype(dtype if jnp.issubdtype(dtype, jnp.inexact) else wide_dtype(dtype))


def as_updates(tree: Any, gradients: Any, params: Any = None) -> Any:
    """`as_update` of each leaf."""
    rest = () if params is None else (params,)
    return jax.tree.map(as_update, tree, gradients, *rest)


def as_stored(new: Any, old: Any) -> Any:
    """Arrays of a state in the dtypes that they had, which a user may have cast."""
    return jax.tree.map(lambda n, o: n if n.dtype == o.dtype else n.astype(o.dtype), new, old)


def times(x: ArrayLike, factor: jax.Array) -> jax.Array:
    """`x`, float32 at least, times a scalar."""
    wide = at_least_float32(x)
    return wide * factor.astype(wide.dtype)


def finite(x: jax.Array) -> jax.Array:
    """`x` with zero for NaN and infinities."""
    # `jnp.where` is a function of its own, which would be compiled into each of its callers.
    return jax.lax.select(jnp.isfinite(x), x, jnp.zeros_like(x))


def scalar_dtype(tree: Any) -> Any:
    """The precision of scalars shared by all leaves: the widest of them, float32 at least."""
    return wide_dtype(*jax.tree.leaves(jax.tree.map(jnp.result_type, tree)))
